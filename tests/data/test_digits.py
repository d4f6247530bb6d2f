"""The embedded data set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpcli.data import digits
from mpcli.data.image_sources import describe, load
from mpcli.recipe.data import Digits
from mpcli.recipe.errors import Exit, UserError

DIGITS = Digits(kind="digits")


def test_it_is_what_its_description_says():
    splits, info = load(DIGITS)
    assert info == describe(DIGITS)
    for split, num_images in zip(splits, (info.num_train, info.num_eval), strict=True):
        assert split.images.shape == (num_images, *info.input_shape)
        assert split.images.dtype == torch.uint8 and split.images.max() == 16
        assert split.labels.dtype == torch.int64


def test_both_splits_hold_every_class_in_its_share():
    splits, _ = load(DIGITS)
    train, held_out = (torch.bincount(split.labels, minlength=10) for split in splits)
    share = held_out / (train + held_out)
    assert (train + held_out).sum() == 1797
    assert share.min() > 0.19 and share.max() < 0.21


def test_the_split_is_the_same_every_time_and_has_no_image_twice():
    from sklearn.datasets import load_digits

    splits, again = load(DIGITS)[0], load(DIGITS)[0]
    assert torch.equal(splits.train.images, again.train.images)
    both = torch.cat([splits.train.images, splits.eval.images]).flatten(1)
    original = torch.from_numpy(load_digits().data).to(torch.uint8)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, original.tolist()))


def test_a_scikit_learn_without_them_is_told_with_one_that_has_them(monkeypatch, tmp_path):
    other = SimpleNamespace(locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(digits, "distribution", lambda name: other)
    with pytest.raises(UserError, match="scikit-learn has no digits") as caught:
        digits.load()
    (problem,) = caught.value.problems
    assert problem.exit_code == Exit.ENVIRONMENT
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert problem.hint in [f'pip install "{pin}"' for pin in pins]
