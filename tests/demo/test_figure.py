"""The picture: what is in it, and that it can be written."""

from __future__ import annotations

import pytest
import torch

from torchbatch.demo import data, figure
from torchbatch.demo.report import Findings


@pytest.fixture
def findings():
    digits = data.load()[:30]
    predictions = digits.labels.clone()
    predictions[4] = 9
    norms = torch.logspace(-4, 2, 30).flip(0)
    return Findings(digits, torch.eye(10)[predictions], norms)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".pdf", ".svg"])
def test_written_in_every_format(findings, tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    figure.save(findings, path)
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert path.read_bytes().startswith(starts[suffix.lower()])


def test_captions_and_colours(findings):
    hardest, easiest, histogram = figure.picture(findings).subfigs
    assert [axes.get_title() for axes in hardest.axes][:6] == ["0", "1", "2", "3", "4, seen as 9", "5"]
    assert hardest.axes[0].get_xlabel() == "100"
    assert hardest.axes[4].title.get_color() == figure.WRONG
    assert hardest.axes[5].title.get_color() == figure.RIGHT
    assert len(easiest.axes) == figure.SHOWN
    assert "96.7% of 30" in histogram.axes[0].get_title(loc="left")


def test_the_histogram_counts_every_image(findings):
    axes = figure.picture(findings).subfigs[2].axes[0]
    heights = [patch.get_height() for patch in axes.patches]
    assert sum(heights) == 30
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["taken for what it is (29)", "taken for another digit (1)"]


def test_a_gradient_of_zero_can_be_drawn(findings, tmp_path):
    findings.norms[-1] = 0.0
    figure.save(findings, tmp_path / "picture.png")


@pytest.mark.parametrize(("norm", "text"), [(112.3, "112"), (10.0, "10"), (3.71, "3.7"), (2.6e-6, "2.6e-06")])
def test_short_numbers(norm, text):
    assert figure.short(norm) == text
