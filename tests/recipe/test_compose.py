from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.errors import UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.optim import AdamW, Sgd
from mpcli.recipe.packaged import packaged_dir
from mpcli.recipe.precision import DynamicScale, StaticScale
from mpcli.recipe.task import ResNet9, SequenceClassification

REST = """\
name: my-run
task: {kind: image-classification, model: {kind: smallnet, width: 8}}
data: {kind: cifar10, augment: [flip, crop]}
precision: {mode: fp16}
train: {epochs: 3, global_batch_size: 64}
"""
SGD = "kind: sgd\nlr: 0.1\nmomentum: 0.9\nschedule: {kind: one-cycle, warmup: 0.2}\n"
Write = Callable[..., str]


def test_the_recipes_own_keys_win_over_a_fragment(write: Write) -> None:
    write(SGD, "configs/optim/mine.yaml")
    loaded = load_recipe(write(f"{REST}use: {{optim: mine}}\noptim: {{lr: 0.5}}\n"))
    optim = loaded.recipe.optim
    assert isinstance(optim, Sgd)
    assert (optim.lr, optim.momentum, optim.schedule.kind) == (0.5, 0.9, "one-cycle")
    assert loaded.origins["optim.lr"] == "recipe.yaml:7:13"
    assert loaded.origins["optim.momentum"] == "configs/optim/mine.yaml:3:11"
    assert loaded.origins["optim.nesterov"] == "default"


def test_a_fragment_beside_the_recipe_comes_before_a_packaged_one(write: Write) -> None:
    write("kind: sgd\nlr: 7\n", "configs/optim/adamw-cosine.yaml")
    recipe = load_recipe(write(f"{REST}use: {{optim: adamw-cosine}}\n")).recipe
    assert isinstance(recipe.optim, Sgd)


def test_packaged_fragments_need_no_checkout(write: Write) -> None:
    recipe = load_recipe(write(f"{REST}use: {{optim: adamw-cosine}}\n")).recipe
    assert isinstance(recipe.optim, AdamW)


def test_fragments_do_not_nest(write: Write) -> None:
    write(f"{SGD}use: {{data: digits}}\n", "configs/optim/mine.yaml")
    with pytest.raises(UserError, match=r"optim\.use: unknown field"):
        load_recipe(write(f"{REST}use: {{optim: mine}}\n"))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".hidden", "a/b", "a b", '"a\\0"'])
def test_fragment_names_are_not_paths(name: str, write: Write) -> None:
    write("kind: sgd\nlr: 1\n", "configs/secret.yaml")
    with pytest.raises(UserError, match="a name, not a path"):
        load_recipe(write(f"{REST}use: {{optim: {name}}}\n"))


def test_a_missing_fragment_is_the_only_problem(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(f"{REST}use: {{optim: nonsense}}\n"))
    assert [problem.path for problem in caught.value.problems] == ["use.optim"]


def test_a_later_kind_starts_from_its_defaults(write: Write) -> None:
    write(SGD, "configs/optim/mine.yaml")
    loaded = load_recipe(write(f"{REST}use: {{optim: mine}}\noptim: {{kind: adamw, lr: 1e-3}}\n"))
    assert loaded.recipe.optim == AdamW(kind="adamw", lr=1e-3)
    assert loaded.dropped == (
        "optim.momentum (configs/optim/mine.yaml:3:1) is dropped: optim.kind is now adamw",
        "optim.schedule (configs/optim/mine.yaml:4:1) is dropped: optim.kind is now adamw",
    )


def test_the_same_kind_drops_nothing(write: Write) -> None:
    write(SGD, "configs/optim/mine.yaml")
    loaded = load_recipe(write(f"{REST}use: {{optim: mine}}\noptim: {{kind: sgd, lr: 1e-3}}\n"))
    assert isinstance(loaded.recipe.optim, Sgd)
    assert loaded.recipe.optim.momentum == 0.9
    assert not loaded.dropped


@pytest.mark.parametrize(
    "overrides",
    [
        ["task.model.kind=resnet9", "task.model.width=16"],
        ["task.model.width=16", "task.model.kind=resnet9"],
        ["task.model={width: 16, kind: resnet9}"],
    ],
)
def test_overrides_are_applied_together_kinds_first(write: Write, overrides: list[str]) -> None:
    recipe = load_recipe(write(), overrides).recipe
    assert recipe.task.model == ResNet9(kind="resnet9", width=16)


def test_nested_kinds_start_afresh_too(write: Write) -> None:
    text = REST.replace("fp16}", "fp16, loss_scale: {kind: dynamic, growth_interval: 5}}")
    text += f"optim: {{{SGD.strip()}}}".replace("\n", ", ") + "\n"
    loaded = load_recipe(
        write(text),
        [
            "precision.loss_scale.kind=static",
            "precision.loss_scale.scale=8",
            "optim.schedule.kind=cosine",
            "task.model.kind=resnet9",
        ],
    )
    assert loaded.recipe.precision.loss_scale == StaticScale(kind="static", scale=8)
    assert loaded.recipe.optim.schedule.warmup == 0
    assert loaded.recipe.task.model == ResNet9(kind="resnet9")
    assert {message.split()[0] for message in loaded.dropped} == {
        "task.model.width",
        "precision.loss_scale.growth_interval",
        "optim.schedule.warmup",
    }


def test_a_section_with_a_default_needs_no_kind(write: Write) -> None:
    recipe = load_recipe(write(), ["engine.device=cpu", "precision.loss_scale.init_scale=8"]).recipe
    assert recipe.engine.device == "cpu"
    assert recipe.precision.loss_scale == DynamicScale(kind="dynamic", init_scale=8)


def test_naming_a_run_to_begin_with_removes_the_model(tmp_path: Path) -> None:
    path = packaged_dir("recipes") / "sst2.yaml"
    loaded = load_recipe(path, [f"task.init_from={tmp_path}"])
    task = loaded.recipe.task
    assert isinstance(task, SequenceClassification)
    assert (task.model, task.init_from) == (None, str(tmp_path))
    assert [
        m for m in loaded.dropped if "task.model" in m and f"task.init_from is now {tmp_path}" in m
    ]
    both = [f"task.init_from={tmp_path}", "task.model={kind: config, name: bert-tiny}"]
    with pytest.raises(UserError, match="are both set"):
        load_recipe(path, both)
    again = tmp_path / "recipe.yaml"
    again.write_text(resolved_yaml(loaded.recipe))
    task = load_recipe(again, both[1:]).recipe.task
    assert isinstance(task, SequenceClassification)
    assert (task.model is not None, task.init_from) == (True, None)


@pytest.mark.parametrize(
    ("override", "epochs", "steps"),
    [("train.steps=7", None, 7), ("train.epochs=7", 7, None), ("train.steps=null", 3, None)],
)
def test_naming_epochs_or_steps_removes_the_other(
    write: Write, override: str, epochs: int | None, steps: int | None
) -> None:
    loaded = load_recipe(write(), [override])
    assert (loaded.recipe.train.epochs, loaded.recipe.train.steps) == (epochs, steps)
    assert len(loaded.dropped) == (override == "train.steps=7")


def test_lists_are_replaced(write: Write) -> None:
    text = f"{REST}optim: {{kind: sgd, lr: 1}}\n"
    assert load_recipe(write(text), ["data.augment=[cutout]"]).recipe.data.augment == ("cutout",)


def test_override_values_obey_the_rules_of_recipes(write: Write) -> None:
    overrides = ["optim.lr=1e-4", "optim.nesterov=true", "train.clip={kind: norm, max_norm: 1e18}"]
    loaded = load_recipe(write(), overrides)
    assert loaded.recipe.optim.lr == 1e-4
    assert loaded.recipe.train.clip is not None
    assert loaded.recipe.train.clip.max_norm == 1e18
    assert loaded.origins["train.clip.max_norm"] == "--set"


def test_a_fragment_can_be_chosen_by_override(write: Write) -> None:
    loaded = load_recipe(
        write(f"{REST}use: {{optim: sgd-one-cycle}}\n"), ["use.optim=adamw-cosine"]
    )
    assert isinstance(loaded.recipe.optim, AdamW)


def test_a_fragment_of_an_override_wins_over_the_recipes_own_keys(write: Write) -> None:
    loaded = load_recipe(
        write(f"{REST}optim: {{kind: sgd, lr: 1}}\n"), ["use.precision=bf16", "optim.lr=2"]
    )
    assert loaded.recipe.precision.mode == "bf16"
    assert "configs/precision/bf16.yaml" in loaded.origins["precision.mode"]


def test_explicit_overrides_win_over_a_fragment_of_an_override(write: Write) -> None:
    loaded = load_recipe(
        write(f"{REST}optim: {{kind: sgd, lr: 1}}\n"), ["optim.lr=2", "use.optim=adamw-cosine"]
    )
    assert isinstance(loaded.recipe.optim, AdamW)
    assert loaded.recipe.optim.lr == 2


def test_what_every_recipe_of_the_old_kind_has_is_dropped_without_a_word(write: Write) -> None:
    engine = "engine: {kind: ddp, device: auto, bucket_megabytes: 25, processes: 2}"
    text = f"{REST}optim: {{kind: sgd, lr: 0.1}}\n{engine}\n"
    loaded = load_recipe(write(text), ["engine.kind=local"])
    (told,) = loaded.dropped
    assert told.startswith("engine.processes (")


def test_a_default_that_the_new_kind_has_not_is_told(write: Write) -> None:
    text = f"{REST}optim: {{kind: adamw, lr: 0.1, weight_decay: 0.01, eps: 1e-8}}\n"
    loaded = load_recipe(write(text), ["optim.kind=sgd", "optim.lr=0.1"])
    (told,) = loaded.dropped  # sgd has no eps, and another weight_decay without a word
    assert told.startswith("optim.weight_decay (")


def test_own_keys_of_the_kind_of_a_replaced_fragment_are_dropped(write: Write) -> None:
    write(SGD, "configs/optim/mine.yaml")
    loaded = load_recipe(
        write(f"{REST}use: {{optim: mine}}\noptim: {{momentum: 0.5}}\n"),
        ["use.optim=adamw-cosine"],
    )
    assert isinstance(loaded.recipe.optim, AdamW)
    assert loaded.dropped == (
        "optim.momentum (recipe.yaml:7:9) is dropped: optim.kind is now adamw",
    )


def test_nothing_but_the_kind_is_left_of_a_replaced_fragment(write: Write) -> None:
    write("mode: fp16\nloss_scale: {kind: static, scale: 8}\n", "configs/precision/mine.yaml")
    text = REST.replace("precision: {mode: fp16}\n", "use: {precision: mine}\n")
    loaded = load_recipe(
        write(f"{text}optim: {{kind: sgd, lr: 1}}\n"), ["use.precision=fp16-dynamic"]
    )
    assert loaded.recipe.precision.loss_scale == DynamicScale(kind="dynamic")


def test_a_replaced_fragment_need_not_exist(write: Write) -> None:
    recipe = write(f"{REST}use: {{optim: nonsense}}\n")
    assert isinstance(load_recipe(recipe, ["use.optim=adamw-cosine"]).recipe.optim, AdamW)


def test_the_same_override_twice_is_one(write: Write) -> None:
    assert load_recipe(write(), ["optim.lr=2", "optim.lr=2"]).recipe.optim.lr == 2


@pytest.mark.parametrize(
    ("overrides", "message", "line", "column"),
    [
        (["optim.lr=1", "optim.lr=2"], "different values", 2, 7),
        (["optim={lr: 1}", "optim.lr=2"], "different values", 2, 7),
        (["optim.lr=1", "optim=sgd"], "different values", 2, 1),
        (["optim.lr"], "expected `path=value`", 1, 1),
        (["=1"], "dotted path", 1, 1),
        ([""], "expected `path=value`", 1, 1),
        (["optim..lr=1"], "dotted path", 1, 1),
        (["optim.=1"], "dotted path", 1, 1),
        (["optim.lr =1"], "dotted path", 1, 1),
        (["optim.lrr=1"], "unknown field", 1, 7),
        (["optm.lr=1"], "unknown field", 1, 1),
        (["name.first=1"], "expected text, found a section", 1, 6),
        (["optim.lr=[1, 2"], "not closed", 1, 10),
        (["data.augment=[flip,"], "a value is expected here", 1, 20),
        (["train.epochs="], "how long to train", 1, 14),
        (["train.seed=1", "train.epochs=null"], "how long to train", 2, 14),
        (["optim.kind=adamw"], "optim.lr: required, but missing", 1, 12),
        (["task.model.kind=torchvision"], "task.model.name: required", 1, 17),
        (["fp16=true"], "unknown field", 1, 1),
        (["optim.lr=!!int 3"], "tag `!!int` is not allowed", 1, 10),
        (["optim.lr=\udcff"], r"U\+DCFF is not allowed", 1, 10),
        (["optim.lr=a\nb"], "one line", 1, 10),
        (["train.seed=0", "optim.lr=x"], "expected a number", 2, 10),
    ],
)
def test_override_mistakes_have_a_place(
    write: Write, overrides: list[str], message: str, line: int, column: int
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(), overrides)
    place = caught.value.problems[0].place
    assert place is not None
    assert (place.file, place.line, place.column) == ("--set", line, column)
    assert place.text == overrides[line - 1]


def test_paths_are_absolute_from_the_launch_directory(write: Write, tmp_path: Path) -> None:
    recipe = write(f"{REST}optim: {{kind: sgd, lr: 1}}\n", "recipes/recipe.yaml")
    assert load_recipe(recipe, ["data.path=../x"]).recipe.data.path == str(tmp_path.parent / "x")
    home = load_recipe(recipe, ["data.path=~/x"]).recipe.data.path
    assert home == str(Path.home() / "x")
