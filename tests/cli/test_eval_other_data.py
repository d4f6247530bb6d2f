"""`mptrain eval` on other data: what a model took from its training data comes from the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpcli.data.image_sources import load
from mpcli.data.images import ImageInfo
from mpcli.data.text.plain import STRETCH
from mpcli.recipe.data import ImageFolder
from mpcli.recipe.errors import Exit
from mpcli.recipe.load import load_recipe
from mpcli.rundir import RunDirectory
from mpcli.tasks import image_classification
from tests.small import run_small
from tests.tasks.test_text import FRESH, GPT, MLM, classification
from tests.tiny_cifar import write_tiny_cifar

EvalMetrics = Callable[..., dict[str, float]]


@pytest.fixture
def metrics(mptrain: Any) -> EvalMetrics:
    """What `mptrain eval RUN --set ...` finds."""

    def call(run: RunDirectory, *overrides: str) -> dict[str, float]:
        outcome = mptrain("eval", run.path, *sets(overrides), "--json")
        assert outcome.code == 0, outcome
        found: dict[str, float] = outcome.json["metrics"]["eval"]
        return found

    return call


@pytest.fixture
def refused(mptrain: Any) -> Callable[..., tuple[int, str]]:
    """Exit code and message of `mptrain eval RUN --set ...`."""

    def call(run: RunDirectory, *overrides: str) -> tuple[int, str]:
        outcome = mptrain("eval", run.path, *sets(overrides))
        assert "Traceback" not in outcome.err
        return outcome.code, outcome.err

    return call


def sets(overrides: tuple[str, ...]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


# Images


def write_images(
    folder: Path,
    classes: tuple[str, ...] = ("bright", "dark"),
    splits: tuple[str, ...] = ("train", "val"),
    *,
    seed: int = 0,
    dim: float = 1.0,
) -> Path:
    """Noise around a level of each class; `dim` < 1 makes all of it darker."""
    random = np.random.default_rng(seed)
    for split in splits:
        for number, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(8):
                pixels = (150 - 60 * number + random.integers(-40, 40, (8, 8, 3))) * dim
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    return folder


def trained(tmp_path: Path, *overrides: str) -> RunDirectory:
    """A run on bright and dark images."""
    folder = write_images(tmp_path / "own")
    data = f"data={{kind: imagefolder, path: {folder}, size: 8}}"
    run, result = run_small(tmp_path, data, "train={steps: 4, global_batch_size: 8}", *overrides)
    assert result.status == "done"
    return run


def moments(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the channels of the training images."""
    data = ImageFolder(kind="imagefolder", path=str(folder), size=8)
    pixels = load(data)[0].train.images.double()
    return pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)


def by_hand(run: RunDirectory, val: Path, mean: torch.Tensor, std: torch.Tensor) -> float:
    """The loss of the run's model on a folder of images, normalised so."""
    recipe = load_recipe(run.recipe_path).recipe
    info = ImageInfo(0, 0, (3, 8, 8), 2, "")
    model = image_classification.build_model(recipe.task, info).eval()  # type: ignore[arg-type]
    model.load_state_dict(load_file(run.final_path / "model.safetensors"))
    pictures = [
        (torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1), label)
        for label, name in enumerate(("bright", "dark"))
        for path in (val / name).iterdir()
    ]
    images = torch.stack([image for image, _ in pictures])
    targets = torch.tensor([label for _, label in pictures])
    with torch.no_grad():
        logits = model(((images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).float())
    return F.cross_entropy(logits, targets).item()


def test_images_are_normalised_as_those_of_the_run(tmp_path: Path, metrics: EvalMetrics) -> None:
    run = trained(tmp_path)
    other = write_images(tmp_path / "other", seed=1, dim=0.3)
    found = metrics(run, f"data.path={other}")
    expected = by_hand(run, other / "val", *moments(tmp_path / "own"))
    wrong = by_hand(run, other / "val", *moments(other))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert wrong != pytest.approx(expected, rel=0.05)
    shutil.rmtree(other / "train")  # nothing is taken from it
    assert metrics(run, f"data.path={other}") == found


@pytest.mark.parametrize("ema", ["train.ema=null", "train.ema=0.5"])
def test_the_same_images_elsewhere_give_the_same_numbers(
    tmp_path: Path, metrics: EvalMetrics, ema: str
) -> None:
    run = trained(tmp_path, ema)
    expected = RunDirectory.read(run.path).result()
    assert expected is not None
    shutil.copytree(tmp_path / "own", tmp_path / "moved")
    for override in (f"data.path={tmp_path / 'moved'}", "data.augment=[flip]"):
        assert metrics(run, override) == expected.metrics["eval"]
    assert metrics(run) == expected.metrics["eval"]


def test_the_trained_model_says_what_it_took_from_the_data(tmp_path: Path) -> None:
    run = trained(tmp_path)
    about = json.loads((run.final_path / "model.json").read_text())["data"]
    mean, std = moments(tmp_path / "own")
    assert about["mean"] == pytest.approx(mean.tolist())
    assert about["std"] == pytest.approx(std.tolist())
    assert (about["num_classes"], about["classes"]) == (2, ["bright", "dark"])


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("bright", "night"), "does not know the class `night`: 2 here, and 2 in the model"),
        (("bright", "dark", "dusk"), "does not know the class `dusk`: 3 here, and 2 in the model"),
    ],
)
def test_other_classes_are_refused(
    tmp_path: Path, refused: Any, classes: tuple[str, ...], said: str
) -> None:
    run = trained(tmp_path)
    code, message = refused(run, f"data.path={write_images(tmp_path / 'other', classes)}")
    assert code == Exit.ENVIRONMENT
    assert said in message
    assert "the classes have to be the run's: `bright`, `dark`" in message


def test_images_of_other_channels_are_refused(tmp_path: Path, refused: Any) -> None:
    run, _ = run_small(tmp_path)
    write_tiny_cifar(tmp_path / "cifar")
    code, message = refused(run, f"data={{kind: cifar10, path: {tmp_path / 'cifar'}}}")
    assert code == Exit.ENVIRONMENT
    assert "the images have 3 channels, and the run's 1" in message


def test_only_an_evaluation_does_without_training_images(tmp_path: Path, mptrain: Any) -> None:
    run = trained(tmp_path)
    shutil.rmtree(tmp_path / "own" / "train")
    for override, said in (
        ("data.normalise=null", "no folder `train`"),
        ("data.normalise={mean: [9, 9, 9], std: [9, 9, 9]}", "nothing to train on: "),
    ):
        outcome = mptrain("plan", run.recipe_path, "--set", override)
        assert outcome.code == Exit.ENVIRONMENT
        assert said in outcome.err


def test_a_recipe_may_say_how_images_are_normalised(tmp_path: Path) -> None:
    measured, usual = run_small(tmp_path, name="measured")
    about = json.loads((measured.final_path / "model.json").read_text())["data"]
    same = f"data.normalise={{mean: {about['mean']}, std: {about['std']}}}"
    assert run_small(tmp_path, same, name="given")[1].metrics == usual.metrics
    other = "data.normalise={mean: [8], std: [2]}"
    run, result = run_small(tmp_path, other, name="other")
    assert result.metrics != usual.metrics
    loader = (run.final_path / "load.py").read_text()
    assert "MEAN = [8.0]" in loader and "STD = [2.0]" in loader


# Text

OWN = "The film was good and Long. "


def write_text(path: Path, words: str, times: int = 60) -> Path:
    path.write_text((words * 3 + "\n") * times, "utf-8")
    return path


@pytest.mark.parametrize("lowercase", ["true", "false"])
@pytest.mark.parametrize("task", [MLM, GPT], ids=["masked", "causal"])
def test_the_same_text_elsewhere_gives_the_same_numbers(
    tmp_path: Path, metrics: EvalMetrics, task: str, lowercase: str
) -> None:
    own = write_text(tmp_path / "own.txt", OWN)
    held_out = write_text(tmp_path / "held out.txt", "The film was Long and good. ")
    data = (f"data.path={own}", f"data.eval_path={held_out}")
    run, result = run_small(
        tmp_path, *data, f"data.tokenizer.lowercase={lowercase}", "train.steps=20", text=task
    )
    expected = result.metrics["eval"]
    assert metrics(run) == expected
    moved = held_out.rename(tmp_path / "moved.txt")
    own.unlink()  # nothing is learnt from it any more
    assert metrics(run, f"data.eval_path={moved}") == expected


def test_other_text_is_in_tokens_of_the_run(tmp_path: Path, metrics: EvalMetrics) -> None:
    own, held_out = (write_text(tmp_path / name, OWN) for name in ("own", "held out"))
    data = (f"data.path={own}", f"data.eval_path={held_out}")
    run, _ = run_small(tmp_path, *data, "train.steps=20", text=GPT)
    words = "Long, long was the dim and good film; as was the gale. "
    for times in (20, 3):  # the second is smaller than a batch
        other = write_text(tmp_path / f"other{times}", words, times)
        expected = causal_by_hand(run.final_path, other.read_text())
        found = metrics(run, f"data.eval_path={other}")
        assert found["loss"] == pytest.approx(expected, rel=1e-5)


def causal_by_hand(final: Path, text: str) -> float:
    """The mean loss of the sequences of 16 tokens that a text of one stretch is cut into."""
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert len(text) < STRETCH
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
    sequences = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    model: Any = AutoModelForCausalLM.from_pretrained(final).eval()
    with torch.no_grad():
        logits = model(input_ids=sequences).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).item()


def test_of_a_single_text_the_tenth_is_evaluated_that_a_run_would_hold_out(
    tmp_path: Path, metrics: EvalMetrics, refused: Any
) -> None:
    own = write_text(tmp_path / "own.txt", OWN, 900)
    run, result = run_small(tmp_path, f"data.path={own}", text=GPT)
    moved = own.rename(tmp_path / "moved.txt")
    assert metrics(run, f"data.path={moved}") == result.metrics["eval"]
    small = write_text(tmp_path / "small.txt", OWN, 10)
    code, message = refused(run, f"data.path={small}")
    assert code == Exit.USAGE
    assert "the held-out text has 0 tokens" in message
    assert "`data.eval_path` names held-out text" in message
    assert metrics(run, f"data.eval_path={small}")["loss"] > 0


def test_text_to_learn_from_is_not_what_is_evaluated(tmp_path: Path, refused: Any) -> None:
    paths = [write_text(tmp_path / name, "one two three. ") for name in ("a", "b", "c")]
    own = (f"data.path={paths[0]}", f"data.eval_path={paths[1]}")
    run, _ = run_small(tmp_path, *own, text=MLM)
    code, message = refused(run, f"data.path={paths[2]}")
    assert code == Exit.USAGE
    assert f"use `--set data.eval_path={paths[2]}`" in message


def write_rows(folder: Path, labels: tuple[int, ...], name: str = "validation") -> Path:
    """A split in which `good` has the label 1, as in the run's `rows`."""
    folder.mkdir(exist_ok=True)
    words = ("bad", "good", "odd")
    lines = [f"a {words[label]} film,{label}" for label in labels] * 20
    (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n", "utf-8")
    return folder


@pytest.mark.parametrize("labels", [(0, 1), (0,), (1,)])
def test_a_table_with_nothing_but_a_split_to_evaluate(
    tmp_path: Path, metrics: EvalMetrics, labels: tuple[int, ...]
) -> None:
    run, result = run_small(tmp_path, text=classification(tmp_path, FRESH))
    assert result.metrics["eval"]["accuracy"] == 1.0
    assert json.loads((run.final_path / "model.json").read_text())["data"]["num_classes"] == 2
    other = write_rows(tmp_path / "other", labels)
    assert metrics(run, f"data.path={other}")["accuracy"] == 1.0
    write_rows(other, labels, "test")
    (other / "validation.csv").unlink()
    assert metrics(run, f"data.path={other}", "data.eval_split=test")["accuracy"] == 1.0
    assert metrics(run, "data.eval_split=train")["accuracy"] == 1.0  # of the run's own


def test_a_label_that_the_model_does_not_have_is_named(tmp_path: Path, refused: Any) -> None:
    run, _ = run_small(tmp_path, text=classification(tmp_path, FRESH))
    other = write_rows(tmp_path / "other", (0, 1, 2))
    code, message = refused(run, f"data.path={other}")
    assert code == Exit.ENVIRONMENT
    assert "validation.csv: line 4: the label '2' is none of the known ones (0, 1)" in message


@pytest.mark.parametrize("other", [(), ("data.eval_path=other.txt",)])
def test_a_run_that_began_with_another_needs_it_no_more(
    tmp_path: Path, metrics: EvalMetrics, monkeypatch: pytest.MonkeyPatch, other: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_text(tmp_path / "text.txt", "we went home and they came too")
    write_text(tmp_path / "other.txt", "they went and we came home")
    own = f"data={{kind: text, path: {path}, eval_path: {path}, sequence_length: 16}}"
    first, _ = run_small(tmp_path, own, name="first", text=MLM)
    begun = f"task={{kind: masked-lm, init_from: {first.path}}}"
    run, result = run_small(tmp_path, own, begun, name="run", text=MLM)
    assert result.status == "done", result
    before = metrics(run, *other)
    if not other:
        assert before == result.metrics["eval"]
    shutil.rmtree(first.path)
    assert metrics(run, *other) == before


def test_columns_that_are_called_otherwise(
    tmp_path: Path, metrics: EvalMetrics, refused: Any
) -> None:
    run, _ = run_small(tmp_path, text=classification(tmp_path, FRESH))
    other = write_rows(tmp_path / "other", (0, 1))
    file = other / "validation.csv"
    file.write_text(file.read_text().replace("text,label", "sentence,class"))
    code, message = refused(run, f"data.path={other}")
    assert code == Exit.ENVIRONMENT
    assert "has no column `text`; its columns: `sentence`, `class`" in message
    columns = ("data.text_columns=[sentence]", "data.label_column=class")
    assert metrics(run, f"data.path={other}", *columns)["accuracy"] == 1.0


# Runs that cannot


@pytest.mark.parametrize(
    ("override", "task"),
    [
        ("data.tokenizer={kind: wordpiece, vocab_size: 100}", MLM),
        ("data.tokenizer.vocab_size=100", MLM),
        ("data.normalise={mean: [1], std: [1]}", None),
    ],
)
def test_what_the_run_took_cannot_be_set(
    tmp_path: Path, refused: Any, override: str, task: str | None
) -> None:
    run, _ = run_small(tmp_path, **({"text": task} if task else {}))  # type: ignore[arg-type]
    code, message = refused(run, override)
    assert code == Exit.USAGE
    assert "the model was trained with the run's own" in message
    assert f"    1 | {override}" in message


def test_a_run_without_its_end_has_only_its_own_data(
    tmp_path: Path, metrics: EvalMetrics, refused: Any
) -> None:
    run, result = run_small(tmp_path)
    run.final_path.rename(tmp_path / "gone")
    assert metrics(run) == result.metrics["eval"]
    code, message = refused(run, "data.augment=[flip]")
    assert code == Exit.USAGE
    assert "there is none yet" in message
    assert f"mptrain run --resume {run.path}" in message


@pytest.mark.parametrize("text", ["", "{}", '{"data": null}', '{"data": {"mean": "grey"}}'])
def test_a_trained_model_that_says_nothing(tmp_path: Path, refused: Any, text: str) -> None:
    run, _ = run_small(tmp_path)
    (run.final_path / "model.json").write_text(text)
    code, message = refused(run, "data.augment=[flip]")
    assert code == Exit.CHECKPOINT
    assert "says nothing about what the model took" in message


def test_labels_with_names_mean_the_same_elsewhere(tmp_path: Path, metrics: EvalMetrics) -> None:
    def named(folder: Path, split: str, *labels: int) -> None:
        file = write_rows(folder, labels, split) / f"{split}.csv"
        text = file.read_text().replace(",0\n", ",worse\n").replace(",1\n", ",better\n")
        file.write_text(text)

    for split in ("train", "validation"):
        named(tmp_path / "own", split, 0, 1)
    own = f"data.path={tmp_path / 'own'}"
    run, result = run_small(tmp_path, own, text=classification(tmp_path, FRESH))
    assert result.metrics["eval"]["accuracy"] == 1.0
    config = json.loads((run.final_path / "config.json").read_text())
    assert config["id2label"] == {"0": "better", "1": "worse"}
    tokenizer = json.loads((run.final_path / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == load_recipe(run.recipe_path).recipe.data.sequence_length
    named(tmp_path / "other", "validation", 0)  # `worse`, which is not the first here either
    assert metrics(run, f"data.path={tmp_path / 'other'}")["accuracy"] == 1.0
