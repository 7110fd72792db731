"""The images are scikit-learn's, all of them and in their order, and the split is a split."""

from __future__ import annotations

import hashlib
from importlib import resources

import pytest
import torch

from torchbatch.demo import data

DIRECTORY = resources.files("torchbatch") / "data" / "digits"


def test_the_file_is_the_one_that_was_shipped_first():
    digest = hashlib.sha256((DIRECTORY / "digits.npz").read_bytes()).hexdigest()
    assert digest == "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"


def test_its_source_and_licence_are_beside_it():
    notice = (DIRECTORY / "NOTICE.md").read_text(encoding="utf-8")
    for part in ("Optical Recognition of Handwritten Digits", "E. Alpaydin", "C. Kaynak", "CC BY 4.0", "scikit-learn"):
        assert part in notice


def test_equal_to_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    expected = datasets.load_digits()
    digits = data.load()
    assert torch.equal(digits.images[:, 0] * 16, torch.from_numpy(expected.images).float())
    assert torch.equal(digits.labels, torch.from_numpy(expected.target).long())


def test_shapes_types_and_range():
    digits = data.load()
    assert len(digits) == 1797
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.dtype == torch.float32
    assert digits.images.min() == 0 and digits.images.max() == 1
    assert digits.labels.dtype == torch.int64 and digits.labels.unique().tolist() == list(range(data.CLASSES))
    assert torch.equal(digits.numbers, torch.arange(1797))


def test_split_loses_and_repeats_nothing():
    digits = data.load()
    train, held_out = data.split(digits, 360, torch.Generator().manual_seed(0))
    assert (len(train), len(held_out)) == (1437, 360)
    numbers = torch.cat([train.numbers, held_out.numbers])
    assert torch.equal(numbers.sort().values, digits.numbers)
    assert torch.equal(train.images, digits.images[train.numbers])
    assert torch.equal(held_out.labels, digits.labels[held_out.numbers])


def test_split_follows_its_generator():
    digits = data.load()
    first, again, other = (data.split(digits, 9, torch.Generator().manual_seed(seed))[1] for seed in (0, 0, 1))
    assert torch.equal(first.numbers, again.numbers)
    assert not torch.equal(first.numbers, other.numbers)


def test_to_moves_all_three():
    moved = data.load()[:3].to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.images, moved.labels, moved.numbers)} == {"meta"}
