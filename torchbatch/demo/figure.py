"""What the demo draws: the hardest and the easiest images, and how the lengths of the gradients spread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchbatch.demo.report import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
SHOWN = 10
RIGHT, WRONG, INK, QUIET = "#4878a8", "#c8452f", "#222222", "#777777"


def save(findings: Findings, path: Path) -> None:
    """Write the picture; the end of the name says in which format."""
    picture(findings).savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.2)


def picture(findings: Findings) -> Figure:
    """Two rows of images above a histogram."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    rows: Any = figure.subfigures(3, 1, height_ratios=(1, 1, 1.75))
    draw_images(rows[0], findings, findings.hardest(SHOWN), "Hardest: the longest gradients")
    draw_images(rows[1], findings, findings.easiest(SHOWN), "Easiest: the shortest gradients")
    draw_histogram(rows[2].subplots(), findings)
    return figure


def draw_images(row: Any, findings: Findings, places: Tensor, title: str) -> None:
    """A row of images, each with what it is and what it was taken for."""
    row.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
    for axes, place in zip(row.subplots(1, SHOWN), places.tolist(), strict=True):
        axes.imshow(findings.digits.images[place, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        colour = RIGHT if findings.right[place] else WRONG
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=2)
        axes.set_title(caption(findings, place), fontsize=9, color=colour)
        axes.set_xlabel(short(findings.norms[place].item()), fontsize=9, color=QUIET)


def caption(findings: Findings, place: int) -> str:
    """What an image is, and what it was taken for where that is something else."""
    label, predicted = int(findings.digits.labels[place]), int(findings.predictions[place])
    return f"{label}" if label == predicted else f"{label}, seen as {predicted}"


def short(norm: float) -> str:
    """A length in few characters: ``112``, ``3.7``, ``2.6e-06``."""
    return f"{norm:.0f}" if norm >= 10 else f"{norm:.2g}"


def draw_histogram(axes: Any, findings: Findings) -> None:
    """How many images have a gradient of which length, on a logarithmic scale."""
    norms = findings.norms.clamp_min(torch.finfo(findings.norms.dtype).tiny)
    bins = np.geomspace(norms.min().item() / 1.01, norms.max().item() * 1.01, 41)
    parts = [norms[findings.right].numpy(), norms[~findings.right].numpy()]
    labels = [f"taken for what it is ({len(parts[0])})", f"taken for another digit ({len(parts[1])})"]
    axes.hist(parts, bins=bins, stacked=True, color=[RIGHT, WRONG], label=labels)
    axes.set_xscale("log")
    axes.set_xlabel("length of the gradient of one image's loss")
    axes.set_ylabel("held-out images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{findings.accuracy:.1%} of {len(norms)} held-out images right", loc="left", fontsize=12, color=INK)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
