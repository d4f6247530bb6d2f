from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpcli.recipe.errors import UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import packaged_dir

Write = Callable[..., str]


def problems(path: str) -> list[tuple[str, str]]:
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    return [(problem.path, problem.what) for problem in caught.value.problems]


@pytest.mark.parametrize(
    "path", sorted(packaged_dir("recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_packaged_recipes_are_valid_and_named_after_their_file(path: Path) -> None:
    assert load_recipe(path).recipe.name == path.stem


@pytest.mark.parametrize("prefix", ["", "\ufeff", "---\n", "# comment\r\n"])
def test_harmless_beginnings(prefix: str, write: Write) -> None:
    assert load_recipe(write(prefix + Path(write()).read_text())).recipe.name == "my-run"


def test_origins_name_every_leaf(write: Write) -> None:
    origins = load_recipe(write()).origins
    assert origins["name"] == "recipe.yaml:1:7"
    assert origins["task.model.kind"] == "recipe.yaml:2:50"
    assert origins["precision.loss_scale.kind"] == "default"
    assert origins["train.clip"] == "default"
    assert origins["data.augment"] == "default"


def test_place_is_of_the_value_or_of_what_is_written_around_it(write: Write) -> None:
    loaded = load_recipe(write(), ["train.seed=3"])

    def place(path: str) -> tuple[str, int, int] | None:
        found = loaded.place(path)
        return (found.file, found.line, found.column) if found else None

    assert place("optim.lr") == ("recipe.yaml", 5, 24)
    assert place("optim.schedule.warmup") == ("recipe.yaml", 5, 1)
    assert place("train.seed") == ("--set", 1, 12)
    assert place("engine.device") is None


def test_the_source_is_kept_as_it_was_read(write: Write) -> None:
    loaded = load_recipe(write())
    assert loaded.source == Path(loaded.file).read_text()


def test_problems_come_together_in_the_order_of_the_file(write: Write) -> None:
    text = (
        "name: a/b\n"
        "optim: {kind: sgd, lr: 1, nesterov: true, lr: 2}\n"
        "train: {epochs: 1, steps: 1, global_batch_size: 4}\n"
        "data: {kind: cifar}\n"
        "task: {kind: image-classification, model: {kind: resnet9, width: 0}}\n"
    )
    assert [path for path, _ in problems(write(text))] == [
        "name",
        "optim.nesterov",
        "",
        "train.steps",
        "data.kind",
        "task.model.width",
    ]


def test_at_most_twenty_problems_are_told(write: Write) -> None:
    found = problems(write("".join(f"f{i}: 1\n" for i in range(200))))
    assert len(found) == 21
    assert found[-1][1].endswith("more problems are not shown")


def test_a_whole_number_is_a_number(write: Write) -> None:
    lr = load_recipe(write(), ["optim.lr=1"]).recipe.optim.lr
    assert (lr, type(lr)) == (1.0, float)


@pytest.mark.parametrize("value", ["true", "'1'", "1.0", "1e0", "[1]", "{a: 1}", "1_0", "no", "~"])
def test_nothing_else_becomes_a_whole_number(value: str, write: Write) -> None:
    with pytest.raises(UserError, match=r"train\.max_consecutive_skips: expected"):
        load_recipe(write(), [f"train.max_consecutive_skips={value}"])


@pytest.mark.parametrize("value", ["true", "'1'", ".nan", ".inf", "-.inf", "0", "-1", "1e400", "~"])
def test_nothing_else_becomes_a_learning_rate(value: str, write: Write) -> None:
    with pytest.raises(UserError, match=r"optim\.lr: expected"):
        load_recipe(write(), [f"optim.lr={value}"])


@pytest.mark.parametrize("value", ["yes", "no", "on", "1", "0", "True", "'true'", "~"])
def test_nothing_else_becomes_true_or_false(value: str, write: Write) -> None:
    with pytest.raises(UserError, match=r"optim\.nesterov: expected"):
        load_recipe(write(), [f"optim.nesterov={value}"])


@pytest.mark.parametrize("items", ["['0.9', 0.99]", "[true, 0.99]", "[0.9]", "[0.9, 0.9, 0.9]"])
def test_lists_convert_nothing(items: str, write: Write) -> None:
    with pytest.raises(UserError, match=r"optim\.betas"):
        load_recipe(write(), [f"optim={{kind: adam, lr: 1, betas: {items}}}"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("recipes.yaml", "did you mean `recipe.yaml`?"),
        ("digits-fp16", "copy it here first: `mptrain init digits-fp16`"),
        ("digits-fp16.yaml", "copy it here first: `mptrain init digits-fp16`"),
        ("digit-fp16.yaml", "did you mean the template `digits-fp16`?"),
        ("recip.yml", "did you mean `recipe.yaml`?"),
        ("nofile.yaml", "`mptrain init` copies a recipe to begin with"),
        ("elsewhere/zzz.yaml", "`mptrain init` copies a recipe to begin with"),
    ],
)
def test_a_missing_file_suggests_another(name: str, hint: str, write: Write) -> None:
    write()
    with pytest.raises(UserError, match="no such file") as caught:
        load_recipe(name)
    assert (caught.value.problems[0].hint or "").startswith(hint)


def test_a_recipe_without_a_name(write: Write) -> None:
    write()
    assert problems("") == [("", "no recipe is named")]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optim.lr=1,5", "write `1.5`"),
        ("optim.lr=0,001", "write `0.001`"),
        ("optim.lr=1,000", "write `1000` or `1.000`, without a comma"),
        ("optim.lr=1,000,000", "write `1000000`"),
        ("optim.lr=1,234.5", "write `1234.5`"),
        ("train.epochs=1,000", "write `1000`"),
        ("train.epochs=1,5", None),
    ],
)
def test_commas_in_numbers(write: Write, override: str, hint: str | None) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(), [override])
    assert caught.value.problems[0].hint == hint


@pytest.mark.parametrize("digits", [20, 50, 400, 5000])
def test_a_number_of_many_digits_is_answered_with_the_bound(write: Write, digits: int) -> None:
    with pytest.raises(UserError, match="expected less than 2147483648"):
        load_recipe(write(), [f"train.epochs={'9' * digits}"])
    with pytest.raises(UserError) as caught:
        load_recipe(write(), [f"optim.weight_decay={'9' * digits}" if digits > 50 else "name=/"])
    if digits > 50:
        assert caught.value.problems[0].hint == "the largest number is about 1.8e308"


@pytest.mark.parametrize("content", ["", "\n", "# only this\n", "---\n", "~\n", "\ufeff"])
def test_a_file_without_content(content: str, write: Write) -> None:
    assert problems(write(content)) == [("", "the file holds no recipe")]


def test_loading_is_cheap_and_needs_no_torch(write: Write) -> None:
    code = (
        "import sys, time\n"
        "from mpcli.recipe.load import load_recipe\n"
        f"load_recipe({write()!r})\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'transformers', 'datasets', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "print(time.process_time())\n"
    )
    command = [sys.executable, "-c", code]
    # The least of some: what else runs on the machine costs CPU time too.
    seconds = [float(subprocess.check_output(command, text=True)) for _ in range(5)]
    assert min(seconds) < 0.5
