"""Modes, loss scales and sensitive layers as a recipe may write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import pytest

from mpcli.recipe.errors import Problem, UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.precision import (
    GROUPS,
    MAX_POINTS,
    DynamicScale,
    Mode,
    Precision,
    ScheduledScale,
)

VALID = """\
name: my-run
task: {kind: image-classification, model: {kind: smallnet}}
data: {kind: digits}
optim: {kind: sgd, lr: 0.1}
train: {epochs: 3, global_batch_size: 64}
precision: """
Write = Callable[..., str]


def precision(write: Write, **fields: Any) -> Precision:
    """The section as a recipe file with these fields gives it."""
    return load_recipe(write(VALID + json.dumps(fields))).recipe.precision


def problem(write: Write, **fields: Any) -> Problem:
    """The one problem of a recipe with these fields."""
    with pytest.raises(UserError) as caught:
        precision(write, **fields)
    (found,) = caught.value.problems
    return found


def marked(found: Problem) -> str:
    """The source text under the carets."""
    assert found.place
    start = found.place.column - 1
    return found.place.text[start : start + found.place.length]


@pytest.mark.parametrize("mode", get_args(Mode))
def test_fp16_modes_scale_the_loss_unless_told_otherwise(write: Write, mode: str) -> None:
    kind = "dynamic" if mode.startswith("fp16") else "none"
    assert precision(write, mode=mode).loss_scale.kind == kind
    other = {"kind": "static", "scale": 8.0}
    assert precision(write, mode=mode, loss_scale=other).loss_scale.kind == "static"


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        *[("O0", "fp32"), ("o1", "fp16"), ("O2", "fp16-master"), ("o3", "fp16-pure")],
        *[("16-true", "fp16-pure"), ("bf16-true", "bf16-pure"), ("BF16-mixed", "bf16")],
        *[("fp16_master", "fp16-master"), ("bf16-mastr", "bf16-master"), ("TensorFloat32", "tf32")],
    ],
)
def test_modes_of_other_tools_are_answered_with_ours(write: Write, word: str, mode: str) -> None:
    found = problem(write, mode=word)
    assert found.path == "precision.mode"
    assert f"`{mode}`" in (found.hint or "")


def test_only_bf16_pure_rounds_stochastically(write: Write) -> None:
    assert precision(write, mode="bf16-pure", stochastic_rounding=True).stochastic_rounding
    for mode in set(get_args(Mode)) - {"bf16-pure"}:
        found = problem(write, mode=mode, stochastic_rounding=True)
        assert (found.path, marked(found)) == ("precision.stochastic_rounding", "true")
        assert not precision(write, mode=mode, stochastic_rounding=False).stochastic_rounding


@pytest.mark.parametrize(
    "pattern",
    [
        *[*GROUPS, "LayerNorm", "BatchNorm2d", "head.*", "encoder.0", "*.attention", "*", "fc?"],
        *["blocks.[0-3].*", "blocks.[!0].norm1", "norms*", "norm1", "a-b", "_x", "decoder", "fc"],
    ],
)
def test_sensitive_layers_are_groups_paths_and_classes(write: Write, pattern: str) -> None:
    assert precision(write, sensitive_layers=[pattern]).sensitive_layers == (pattern,)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        *[("norms", "`norm`"), ("heads", "`head`"), ("atention", "`attention`")],
        *[("embeddings", "`embedding`"), ("sofmax", "`softmax`"), ("losses", "`loss`")],
        *[("", "such as"), (" norm", "such as"), ("norm,head", "such as"), ("a/b", "such as")],
        *[("a..b", "such as"), (".a", "such as"), ("a.", "such as"), (".", "such as")],
    ],
)
def test_other_sensitive_layers_are_refused_at_their_place(
    write: Write, pattern: str, hint: str
) -> None:
    found = problem(write, sensitive_layers=["head", pattern])
    assert found.path == "precision.sensitive_layers.1"
    assert marked(found) == json.dumps(pattern)
    assert hint in (found.hint or "")


def test_points_become_numbers_of_the_schema(write: Write) -> None:
    scheduled = precision(
        write, loss_scale={"kind": "scheduled", "points": [[0, 65536], [10, 0.5]]}
    ).loss_scale
    assert isinstance(scheduled, ScheduledScale)
    assert scheduled.points == ((0, 65536.0), (10, 0.5))
    dynamic = precision(
        write, loss_scale={"kind": "dynamic", "min_scale": [[0, 2], [10, 16777216]]}
    ).loss_scale
    assert isinstance(dynamic, DynamicScale)
    assert dynamic.floors == dynamic.min_scale == ((0, 2.0), (10, 16777216.0))
    assert DynamicScale(kind="dynamic", min_scale=4).floors == ((0, 4.0),)


@pytest.mark.parametrize("field", ["points", "min_scale"])
@pytest.mark.parametrize(
    ("points", "place", "text"),
    [
        ([[1, 8]], ".0.0", "1"),
        ([[0, 8], [5, 8], [5, 4]], ".2.0", "5"),
        ([[0, 8], [5, 8], [4, 4]], ".2.0", "4"),
        ([[0, 8], [-1, 4]], ".1.0", "-1"),
        ([[0, 8], [2147483648, 4]], ".1.0", "2147483648"),
        ([[0, 8], [1.0, 4]], ".1.0", "1.0"),
        ([[0, 8], [True, 4]], ".1.0", "true"),
        ([[0, 0]], ".0.1", "0"),
        ([[0, 1e39]], ".0.1", "1e+39"),
        ([[0, "8"]], ".0.1", '"8"'),
        ([[0, None]], ".0.1", "null"),
        ([[0, [8]]], ".0.1", "[8]"),
        ([[0, 8], [5]], ".1", "[5]"),
        ([[0, 8], [5, 4, 3]], ".1", "[5, 4, 3]"),
        ([[0, 8], 5], ".1", "5"),
        ([[0, 8], {"5": 4}], ".1", None),
        ([], "", "[]"),
        ([0, 8], "", "[0, 8]"),
        ([[step, 8] for step in range(MAX_POINTS + 1)], "", None),
    ],
)
def test_points_are_refused_at_their_place(
    write: Write, field: str, points: Any, place: str, text: str | None
) -> None:
    kind = "scheduled" if field == "points" else "dynamic"
    found = problem(write, loss_scale={"kind": kind, field: points})
    assert found.path == f"precision.loss_scale.{field}{place}"
    assert text is None or marked(found) == text


def test_as_many_points_as_allowed(write: Write) -> None:
    points = [[step, 8] for step in range(MAX_POINTS)]
    scale = precision(write, loss_scale={"kind": "scheduled", "points": points}).loss_scale
    assert isinstance(scale, ScheduledScale)
    assert len(scale.points) == MAX_POINTS


@pytest.mark.parametrize(
    ("scale", "place", "text"),
    [
        ({"min_scale": [[0, 1], [9, 64]], "max_scale": 32, "init_scale": 8}, "min_scale.1.1", "64"),
        ({"min_scale": [[0, 64], [9, 1]], "max_scale": 32, "init_scale": 8}, "min_scale.0.1", "64"),
        ({"min_scale": 64, "max_scale": 32, "init_scale": 8}, "min_scale", "64"),
        ({"min_scale": [[0, 16], [9, 1]], "init_scale": 8}, "init_scale", "8"),
        ({"min_scale": 16, "init_scale": 8}, "init_scale", "8"),
    ],
)
def test_floors_leave_room_for_the_scale(
    write: Write, scale: dict[str, Any], place: str, text: str
) -> None:
    found = problem(write, loss_scale={"kind": "dynamic", **scale})
    assert (found.path, marked(found)) == (f"precision.loss_scale.{place}", text)


def test_a_later_floor_may_be_above_the_first_scale(write: Write) -> None:
    scale = {"kind": "dynamic", "init_scale": 8, "min_scale": [[0, 1], [9, 64]]}
    assert precision(write, loss_scale=scale).loss_scale.kind == "dynamic"
