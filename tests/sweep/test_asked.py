"""What is asked of a sweep: values, modes, settings, and the cells that follow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcli.recipe.errors import UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.precision import NoScale, StaticScale
from mpcli.sweep import asked
from mpcli.sweep.asked import grid, modes, scales
from mpcli.sweep.cells import Cell
from mpcli.sweep.text import number_text
from tests.small import small_recipe


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("2^8..2^11", (256.0, 512.0, 1024.0, 2048.0)),
        ("256..1024", (256.0, 512.0, 1024.0)),
        ("2^-2..2^1", (0.25, 0.5, 1.0, 2.0)),
        ("2^8..2^8", (256.0,)),
        ("2^8", (256.0,)),
        ("1, 256,65536 ,dynamic", (1.0, 256.0, 65536.0, "dynamic")),
        ("1e3,0.5", (1000.0, 0.5)),
        ("256,2^8,2^7..2^9,dynamic,dynamic", (256.0, 128.0, 512.0, "dynamic")),
        ("2^-126,2^127", (2.0**-126, 2.0**127)),
    ],
)
def test_values(text, values):
    assert scales(text) == values


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "one is empty"),
        ("1,,2", "one is empty"),
        ("fast", "expected a scale, found `fast`"),
        ("2^", "expected a scale, found `2^`"),
        ("2^1.5", "expected a scale, found `2^1.5`"),
        ("2**8", "expected a scale, found `2**8`"),
        ("true", "expected a scale, found `true`"),
        ("null", "expected a scale, found `null`"),
        (".nan", "`.nan` is not between"),
        (".inf", "`.inf` is not between"),
        ("1e400", "`1e400` is not between"),
        ("9" * 4000, "is not between"),
        ("2^128", "`2^128` is not between 2^-126 and 2^127"),
        ("2^9999", "`2^9999` is not between"),
        ("0", "`0` is not between"),
        ("-256", "`-256` is not between"),
        ("2^8..", "expected a scale, found `2^8..`"),
        ("..2^8", "expected a scale, found `..2^8`"),
        ("2^8..dynamic", "expected a scale, found `2^8..dynamic`"),
        ("2^9..2^8", "the range ends before it begins"),
        ("100..200", "the ends of a range are powers of two"),
        ("2^1..2^2..2^3", "expected a scale, found"),
    ],
)
def test_bad_values_say_what_is_expected(text, what):
    with pytest.raises(UserError) as raised:
        scales(text)
    assert what in str(raised.value)
    assert raised.value.problems[0].hint
    assert raised.value.exit_code == 2


@given(st.floats(2.0**-126, 2.0**127))
def test_a_scale_keeps_its_value_through_label_and_recipe(value):
    assert scales(number_text(value)) == (value,)


def test_a_loss_scale_sweep_has_a_reference_and_the_recipe_at_every_scale(tmp_path):
    loaded = small_recipe(tmp_path, "precision.mode=fp16", "train.seed=7")
    sweep = asked.loss_scale_sweep(loaded.recipe, (1.0, 65536.0, "dynamic"), steps=30, seeds=2)
    assert [(cell.label, cell.seed) for cell in sweep.cells] == [
        (label, seed) for label in ("fp32", "scale=1", "scale=65536", "dynamic") for seed in (7, 8)
    ]
    assert sweep.record == {
        "steps": 30, "seeds": [7, 8], "values": [1.0, 65536.0, "dynamic"],
    }  # fmt: skip
    assert "probe={every: 0, shadow_every: 0, steps: [1, 3, 30]}" in sweep.cells[0].settings
    own = [[s for s in cell.settings if "precision" in s] for cell in sweep.cells[::2]]
    assert own == [
        ["precision.mode=fp32", "precision.loss_scale={kind: none}"],
        ["precision.loss_scale={kind: static, scale: 1}"],
        ["precision.loss_scale={kind: static, scale: 65536}"],
        [],  # the recipe's own
    ]


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 100])
def test_the_moments_are_the_first_step_a_tenth_and_the_last(tmp_path, steps):
    loaded = small_recipe(tmp_path, "precision.mode=fp16")
    cell = asked.loss_scale_sweep(loaded.recipe, (1.0,), steps=steps, seeds=1).cells[0]
    (probe,) = (setting for setting in cell.settings if setting.startswith("probe="))
    moments = {1: "[1]", 2: "[1, 2]", 9: "[1, 9]", 10: "[1, 10]", 100: "[1, 10, 100]"}
    assert f"steps: {moments[steps]}" in probe


def test_a_recipe_without_a_dynamic_scale_is_tried_with_the_default_one(tmp_path):
    static = small_recipe(
        tmp_path, "precision.mode=fp16", "precision.loss_scale={kind: static, scale: 8}"
    )
    cells = asked.loss_scale_sweep(static.recipe, ("dynamic",), steps=4, seeds=1).cells
    assert "precision.loss_scale={kind: dynamic}" in cells[1].settings


def test_a_recipe_that_goes_back_to_checkpoints_skips_in_a_loss_scale_sweep(tmp_path):
    loaded = small_recipe(
        tmp_path,
        "precision.mode=fp16", "train.on_nonfinite=rollback", "output.checkpoint_every=2 steps",
    )  # fmt: skip
    cells = asked.loss_scale_sweep(loaded.recipe, (1.0,), steps=4, seeds=1).cells
    assert all("train.on_nonfinite=skip" in cell.settings for cell in cells)


@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16", "bf16-master", "bf16-pure"])
def test_a_mode_without_a_loss_scale_is_refused_by_naming_one_that_has_it(tmp_path, mode):
    with pytest.raises(UserError) as raised:
        asked.check_scaled(small_recipe(tmp_path, f"precision.mode={mode}"))
    assert raised.value.exit_code == 2
    assert raised.value.problems[0].hint == "add `--set precision.mode=fp16`"
    assert raised.value.problems[0].place


def test_a_mode_with_a_loss_scale_is_not_refused(tmp_path):
    asked.check_scaled(small_recipe(tmp_path, "precision.mode=fp16-master"))


def test_modes():
    assert modes("fp16, fp32,fp16") == ("fp16", "fp32")
    with pytest.raises(UserError, match="unknown mode `fp8`; --modes: unknown mode `bf61`"):
        modes("fp8,bf61,fp32")
    with pytest.raises(UserError, match="unknown mode ``"):
        modes("")


def test_each_mode_has_the_loss_scale_that_belongs_to_it(tmp_path):
    loaded = small_recipe(tmp_path, "precision.mode=fp16", "precision.loss_scale.init_scale=128")
    path = tmp_path / "small.yaml"
    sweep = asked.precision_sweep(loaded.recipe, ("fp32", "bf16", "fp16"), steps=None, seeds=1)
    base = ("precision.mode=fp16", "precision.loss_scale.init_scale=128")
    kinds = {}
    for cell in sweep.cells:
        own = {s.partition("=")[0] for s in cell.settings}
        kept = [s for s in base if s.partition("=")[0] not in own]
        kept = [s for s in kept if not (s.startswith("precision.loss") and cell.label != "fp16")]
        kinds[cell.label] = load_recipe(path, (*kept, *cell.settings)).recipe.precision.loss_scale
    assert isinstance(kinds["fp32"], NoScale) and isinstance(kinds["bf16"], NoScale)
    assert kinds["fp16"].init_scale == 128  # the recipe's own


def test_an_fp32_recipe_is_tried_in_fp16_with_the_default_scale(tmp_path):
    loaded = small_recipe(tmp_path)
    sweep = asked.precision_sweep(loaded.recipe, ("fp32", "fp16-master"), steps=5, seeds=3)
    assert sweep.cells[3].settings == (
        "train.steps=5", "precision.mode=fp16-master", "precision.loss_scale={kind: dynamic}",
    )  # fmt: skip
    assert [cell.seed for cell in sweep.cells] == [0, 1, 2, 0, 1, 2]


def test_a_grid_has_every_combination(tmp_path):
    over = grid(["optim.lr=1e-3, 3e-3", "train.global_batch_size=64,128,64"], [])
    assert over == [
        ("optim.lr=1e-3", "optim.lr=3e-3"),
        ("train.global_batch_size=64", "train.global_batch_size=128"),
    ]
    sweep = asked.grid_sweep(small_recipe(tmp_path).recipe, over, steps=None, seeds=1)
    assert [cell.label for cell in sweep.cells] == [
        "optim.lr=1e-3 train.global_batch_size=64",
        "optim.lr=1e-3 train.global_batch_size=128",
        "optim.lr=3e-3 train.global_batch_size=64",
        "optim.lr=3e-3 train.global_batch_size=128",
    ]
    assert len({cell.name for cell in sweep.cells}) == 4


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ("a=[norm, head], []", ("a=[norm, head]", "a=[]")),
        ("a={kind: none},{kind: static, scale: 1e3}",
         ("a={kind: none}", "a={kind: static, scale: 1e3}")),
        ("a=null,true,no,1e-4", ("a=null", "a=true", "a=no", "a=1e-4")),
        ("a='x,y',\"1\",1", ('a="x,y"', 'a="1"', "a=1")),
        ("a=1,1.0,1e0", ("a=1", "a=1.0")),
        ("eval.every=2 steps,null", ("eval.every=2 steps", "eval.every=null")),
    ],
)  # fmt: skip
def test_values_of_a_grid_obey_the_rules_of_recipes(option, settings):
    assert grid([option], []) == [settings]


@pytest.mark.parametrize(
    ("options", "overrides", "what"),
    [
        ([], [], "nothing to sweep over"),
        (["optim.lr"], [], "expected `path=V1,V2`, found `optim.lr`"),
        (["optim.lr="], [], "expected `path=V1,V2`"),
        (["=1,2"], [], "expected `path=V1,V2`"),
        (["a=1", "a=2"], [], "`a` is set by `--over` too"),
        (["a=1,2"], ["a=3"], "`a` is set by `--set` too"),
        (["train.seed=1,2"], [], "`train.seed` is set by `--seeds` too"),
        (["a=[1,2"], [], "this list is not closed"),
        (["a=1]"], [], "--over:1"),
        (["a=1", "b"], ["a=1"], "`a` is set by `--set` too; --over: expected"),
    ],
)
def test_bad_grids_say_all_that_is_wrong(options, overrides, what):
    from mpcli.recipe.render import render_problem

    with pytest.raises(UserError) as raised:
        grid(options, overrides)
    rendered = "; ".join(render_problem(problem) for problem in raised.value.problems)
    assert what in str(raised.value) + rendered
    assert raised.value.exit_code == 2


def test_cells_with_other_labels_have_other_folders():
    labels = ["a=[b, c]", "a=-b- c-", "a=b", "a=" + 300 * "b", "a=" + 301 * "b"]
    names = [Cell(label, (), 0).name for label in labels]
    assert len(set(names)) == len(labels)
    assert max(map(len, names)) < 150
    assert Cell("scale=256", (), 3).name == "scale=256-seed3"


def test_a_static_scale_of_a_cell_is_one_that_the_schema_has():
    assert StaticScale(kind="static", scale=asked.SCALES[-2]).scale == 2.0**24


@pytest.mark.parametrize(("whole", "short"), [(1, 1), (2, 1), (7, 4), (176, 88), (100_000, 100)])
def test_short_runs_are_half_of_the_recipe_or_a_hundred_steps(whole, short):
    assert asked.short_steps(whole) == short
