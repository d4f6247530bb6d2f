"""A task in a user's own file: run only where it is named, and checked as recipes are."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpcli.engines.local import LocalEngine
from mpcli.recipe.packaged import packaged_dir

EXAMPLE = packaged_dir("recipes") / "plugin"
RUN = ("run", "plugin.yaml", "--plugin", "plugin.py", "--output", "out")
OWN_DATA = '''
class Numbers:
    """A data set from its first line to its last, of a formula instead of files."""

    num_train, num_eval, source, info = 96, 32, "a formula", 2

    def example(self, num_samples):
        targets = torch.zeros(num_samples, dtype=torch.int64)
        return Batch({"inputs": torch.zeros(num_samples, 30), "targets": targets})

    def prepare(self, device):
        self.device = device

    def train_batch(self, seed, step, batch_size):
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        inputs = torch.randn(batch_size, 30, generator=generator)
        return Batch({"inputs": inputs, "targets": (inputs.sum(1) > 0).long()})

    def eval_batches(self, batch_size):
        yield self.train_batch(99, 0, 32)


def load_data(options, data):
    return Numbers()
'''


@pytest.fixture(autouse=True)
def _example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in EXAMPLE.glob("plugin.*"):
        shutil.copy(file, tmp_path)


def change(old: str, new: str, file: str = "plugin.py") -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


def own_data() -> None:
    change("from mpcli.data import TensorDataset", "from mpcli.data import Batch, TensorDataset")
    Path("plugin.py").write_text(Path("plugin.py").read_text() + OWN_DATA)


def short(*more: str) -> tuple[str, ...]:
    return (*RUN, "--set", "train={steps: 6, global_batch_size: 32}", *more)


def test_init_writes_an_example_that_runs(mptrain: Any, tmp_path: Path) -> None:
    for file in Path().iterdir():
        file.unlink()
    outcome = mptrain("init", "plugin")
    assert outcome.out == "wrote plugin.yaml\nwrote plugin.py\n"
    assert "mptrain run plugin.yaml --plugin plugin.py" in outcome.err
    assert Path("plugin.py").read_text() == (EXAMPLE / "plugin.py").read_text()
    assert mptrain("check", "plugin.yaml", "--plugin", "plugin.py").code == 0
    result = mptrain(*RUN, "--json").json
    assert (result["status"], result["exit_code"]) == ("done", 0)
    assert result["metrics"]["eval"]["accuracy"] > 0.94
    assert "data/" not in mptrain("plan", "plugin.yaml", "--plugin", "plugin.py").out


def test_init_writes_over_no_plugin(mptrain: Any) -> None:
    Path("plugin.yaml").unlink()
    outcome = mptrain("init", "plugin")
    assert (outcome.code, outcome.err.splitlines()[0]) == (2, "error: plugin.py exists already")
    assert not Path("plugin.yaml").exists()


def test_the_run_directory_holds_a_copy_and_its_hash(mptrain: Any) -> None:
    assert mptrain(*short()).code == 0
    content = Path("plugin.py").read_bytes()
    assert Path("out/plugin.py").read_bytes() == content
    about = json.loads(Path("out/plugin.json").read_text())
    assert about == {"file": "plugin.py", "sha256": hashlib.sha256(content).hexdigest()}
    assert "width: 32" in Path("out/recipe.yaml").read_text()


def test_the_plugins_options_are_checked_like_every_other_field(mptrain: Any) -> None:
    change("  width: 32", "  widht: 64\n  depth: [1] #", "plugin.yaml")
    outcome = mptrain("check", "plugin.yaml", "--plugin", "plugin.py")
    assert outcome.code == 2
    assert "plugin.yaml:7:3: task.widht: unknown field\n    7 |   widht: 64" in outcome.err
    assert "\n      |   ^^^^^\n  help: did you mean `width`?\n" in outcome.err
    assert "plugin.yaml:8:3: task.depth: unknown field" in outcome.err


@pytest.mark.parametrize(
    ("declared", "value", "said"),
    [
        ("width: int = 32", "wide", "task.width: expected a whole number, found `wide`"),
        ("width: int = Field(32, ge=1)", "0", "task.width: expected at least 1, found `0`"),
        ("width: str = Field(min_length=3)", "ab", "task.width: string should have at least 3 "),
        ("width: Even = 32", "3", "task.width: 3 is odd\n"),
    ],
)
def test_values_of_the_plugins_options(mptrain: Any, declared: str, value: str, said: str) -> None:
    change(
        "class Options",
        "from typing import Annotated\nfrom pydantic import AfterValidator, Field\n\n"
        "def even(n):\n    if n % 2:\n        raise ValueError(f'{n} is odd')\n    return n\n\n"
        "Even = Annotated[int, AfterValidator(even)]\n\nclass Options",
    )
    change("width: int = 32", declared)
    outcome = mptrain(
        "check", "plugin.yaml", "--plugin", "plugin.py", "--set", f"task.width={value}"
    )
    assert outcome.code == 2
    assert said in outcome.err


def declare(*fields: str) -> None:
    """Options of types that recipes themselves do not have."""
    change(
        "class Options(Plugin):",
        "from enum import Enum\nfrom pathlib import Path\nfrom typing import Annotated, Any\n"
        "from pydantic import AfterValidator, BaseModel, ConfigDict\n\n\n"
        "class Color(Enum):\n    RED = 'red'\n    BLUE = 'blue'\n\n\n"
        "class Layer(BaseModel):\n    model_config = ConfigDict(strict=True, extra='forbid')\n"
        "    size: int\n    rate: float = 0.0\n\n\n"
        "def refuse(value):\n    raise KeyError('never')\n\n\nclass Options(Plugin):",
    )
    change("    width: int = 32", "\n    ".join(("    width: int = 32", *fields)))


def test_options_of_every_type_that_yaml_can_say(mptrain: Any) -> None:
    declare(
        "where: Path = Path('here')",
        "dims: tuple[int, ...] = (1,)",
        "color: Color = Color.RED",
        "layers: list[Layer] = [Layer(size=3)]",
        "rates: dict[str, float] = {'a.b': 0.5}",
        "known: set[int] = {1}",
        "by_number: dict[int, str] = {3: 'three'}",
    )
    change(
        "    inputs, targets = map",
        "    assert isinstance(options.where, Path) and options.color in Color\n"
        "    assert options.dims == (1, 2) and options.layers[0].size == 3\n"
        "    assert options.known == {1} and options.by_number == {3: 'three'}\n"
        "    inputs, targets = map",
    )
    change("  width: 32", "  dims: [1, 2]\n  color: blue\n  width: 32", "plugin.yaml")
    planned = mptrain("plan", "plugin.yaml", "--plugin", "plugin.py")
    assert planned.code == 0, planned.err
    assert re.search(r"task.rates +\{a.b: 0.5\}", planned.out)
    outcome = mptrain(*short())
    assert outcome.code == 0, outcome.err
    recipe = Path("out/recipe.yaml").read_text()
    for line in ("  where: here", "  color: blue", "  dims: [1, 2]", '  layers: [{"size": 3, '):
        assert f"\n{line}" in recipe
    again = mptrain("eval", "out", "--plugin", "plugin.py", "--json")
    own = json.loads(Path("out/result.json").read_text())["metrics"]["eval"]
    assert again.json["metrics"]["eval"]["loss"] == pytest.approx(own["loss"], abs=1e-6)
    changed = mptrain(
        "run", "--resume", "out", "--plugin", "plugin.py", "--set", "task.where=there"
    )
    assert changed.code == 2
    assert "task.where: the run has `here`, found `there`" in changed.err


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dims: tuple[int, ...]", "[1, a]", r"13: task.dims.1: expected a whole number, found `a`"),
        ("dims: list[int]", "3", r"9: task.dims: expected a list, found `3`\n.*\n.*\n.*`\[3\]`"),
        ("color: Color", "green", r"10: task.color: input should be 'red' or 'blue', found `gr"),
        ("layer: Layer", "{size: x}", r"17: task.layer.size: expected a whole number, found `x`"),
        ("layer: Layer", "{rate: 1}", r"3: task.layer.size: required, but missing\n"),
        (
            "layer: Layer",
            "{siz: 1}",
            r"11: task.layer.siz: unknown field\n.*\n.*\n  help: did you mean `size`",
        ),
        ("layer: Layer | int", "{size: x}", r"17: task.layer.size: expected a whole number, found"),
        ("layers: list[Layer]", "[{size: 1}, {}]", r"23: task.layers.1.size: required, but mis"),
        ("layers: dict[str, Layer]", "{a: {size: x}}", r"22: task.layers.a.size: expected a wh"),
        ("rates: dict[str, float]", "{a: x}", r"14: task.rates.a: expected a number, found `x`"),
    ],
)
def test_mistakes_in_options_of_other_types(
    mptrain: Any, field: str, value: str, said: str
) -> None:
    declare(field)
    change("  width: 32 ", f"  {field.partition(':')[0]}: {value} ", "plugin.yaml")
    outcome = mptrain("check", "plugin.yaml", "--plugin", "plugin.py")
    assert outcome.code == 2, outcome.err
    assert re.match(f"plugin.yaml:7:{said}", outcome.err), outcome.err
    assert outcome.err.count("plugin.yaml:") == 1


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("plugin: int = 3", r"\d+:5: `Options` has a `plugin` of its own\n"),
        ("kind: str = 'plugin'", r"\d+:5: `Options` has a `kind` of its own\n"),
        ("depth: int = 'x'", r"\d+:5: the default of `depth`: input should be a valid integer\n"),
        ("depth: int = 1 / 0", r"\d+:18: ZeroDivisionError"),
        ("depth: Annotated[int, AfterValidator(refuse)] = 1", r"\d+:5: KeyError: 'never'\n"),
        ("depth: 'Unknown' = 1", r" `Options` is not fully defined"),
        ("depth: Any = torch.float32", r" options that no recipe can hold: .*torch.dtype"),
        (
            "depth: Annotated[int, AfterValidator(lambda n: 2 * n)] = 3",
            r"\d+:5: `depth` is another value when it is read back from a recipe\n",
        ),
        ("layer: Layer = {'size': 1}", r"\d+:5: `layer` is another value when it is read back"),
    ],
)
def test_options_that_no_recipe_can_have(mptrain: Any, field: str, said: str) -> None:
    declare(field)
    outcome = mptrain("check", "plugin.yaml", "--plugin", "plugin.py")
    assert outcome.code == 2, outcome.err
    assert re.match(f"plugin.py:{said}", outcome.err), outcome.err
    assert "warning" not in outcome.err.lower()


def test_a_validator_that_raises_is_the_files_mistake(mptrain: Any) -> None:
    declare("depth: Annotated[int, AfterValidator(refuse)]")
    outcome = mptrain("check", "plugin.yaml", "--plugin", "plugin.py", "--set", "task.depth=3")
    assert outcome.code == 2, outcome.err
    assert re.match(r"plugin.py:\d+:5: KeyError: 'never'\n", outcome.err), outcome.err


def test_only_the_command_line_names_code(mptrain: Any) -> None:
    for command in ("check", "plan", "run"):
        outcome = mptrain(command, "plugin.yaml")
        assert outcome.code == 2
        assert outcome.err.startswith("plugin.yaml:6:3: task.kind: no file with the plug-in is ")
        assert "help: add `--plugin FILE`" in outcome.err
    change("  width: 32", "  file: plugin.py", "plugin.yaml")
    outcome = mptrain("check", "plugin.yaml", "--plugin", "plugin.py")
    assert "task.file: unknown field" in outcome.err


def test_a_plugin_that_nothing_uses_is_refused(mptrain: Any, recipe: Path) -> None:
    outcome = mptrain("plan", recipe, "--plugin", "plugin.py")
    assert outcome.code == 2
    assert "task.kind: nothing uses the plug-in plugin.py" in outcome.err


def test_data_of_a_plugin_are_for_plugins(mptrain: Any, recipe: Path) -> None:
    outcome = mptrain("check", recipe, "--set", "data.kind=plugin")
    assert outcome.code == 2
    assert "data.kind: `plugin` has nothing that image-classification could" in outcome.err


def test_a_plugin_may_learn_from_the_data_of_others(mptrain: Any) -> None:
    change("import torch\n", "import torch\nfrom mpcli.tasks import image_classification\n")
    Path("plugin.py").write_text(
        Path("plugin.py").read_text()
        + "\n\ndef load_data(options, data):\n    options = image_classification.Options"
        "(kind='image-classification', model={'kind': 'resnet9'})\n"
        "    return image_classification.load_data(options, data)\n\n\n"
        "def build_model(options, info):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    assert mptrain(*short("--set", "data.kind=digits")).code == 0


CRASH = "raise RuntimeError('no luck')"
LEAVE = "raise SystemExit(0)"
MISTAKES = {
    "not Python": ("def loss(", "def loss{", r"\d+:\d+: not Python: "),
    "raises at once": ("class Options", f"{CRASH}\n\n\nclass Options", r"\d+:1: RuntimeError: no "),
    "leaves": ("class Options", "raise SystemExit(0)\n\n\nclass Options", r"\d+:1: SystemExit: 0"),
    "imports nothing": ("import torch\n", "import torhc\n", r"\d+:1: ModuleNotFoundError: .*torhc"),
    "no options": ("class Options(", "class Choices(", r" ?no class `Options\(Plugin\)`"),
    "no function": ("def evaluate(", "def eval(", r" ?no function `evaluate\(options, model, ba"),
    "arguments": ("def loss(options, ", "def loss(", r"\d+:1: is called as `loss\(options, model"),
    "load_data": (
        "    inputs, targets = map",
        f"    {CRASH}\n    x = map",
        r"\d+:5: RuntimeError: ",
    ),
    "leaves load_data": ("    inputs, targets = map", f"    {LEAVE}\n    x = map", r"\d+:5: Sys"),
    "leaves build_model": ("    return nn.Seq", f"    {LEAVE}\n    return nn.Seq", r"\d+:5: Sys"),
    "leaves loss": ("    return cross_", f"    {LEAVE}\n    return cross_", r"\d+:5: Sys"),
    "weights": (
        'reduction="sum"), batch.weight',
        'reduction="sum"), torch.tensor([32, 32])',
        r"\d+:1: `loss` returned a int64 tensor of shape \[2\] as the weight of a batch that w",
    ),
    "of a decorated function": (
        "def loss(options, model, batch):",
        "@torch.no_grad()\ndef loss(model, batch):",
        r"(\d+):1: is called as `loss\(.*\n +\1 \| @torch.no_grad\(\)\n",
    ),
    "of another file": (
        "def build_model(",
        "from typing import cast as build_model\n\n\ndef own(",
        r" `build_model` returned a value of type int, not a module\n",
    ),
    "build_model": ("    return nn.Seq", f"    {CRASH}\n    return nn.Seq", r"\d+:5: RuntimeError"),
    "shapes": ("nn.Linear(30,", "nn.Linear(31,", r"\d+:14: RuntimeError: .*\[32, 30\]"),
    "a value is read": (
        "    return cross_entropy(",
        "    print(logits.sum().item())\n    return cross_entropy(",
        r"\d+:11: DataDependentOutputException(.|\n)* help: `plan` runs `loss` on tensors without",
    ),
    "loss alone": (', reduction="sum"), batch.weight', ")", r"\d+:1: `loss` returned a float32 "),
    "a mean": (', reduction="sum"), batch.weight', "), 1", r"\d+:1: `loss` returned 1 as the w"),
    "half": (
        'reduction="sum"), b',
        'reduction="sum").half(), b',
        r"\d+:1: `loss` .*float16 .*fp32",
    ),
    "no model": (
        "    return nn.Seq",
        "    return 3\n    nn.Seq",
        r"\d+:1: `build_model` returned a ",
    ),
    "no data": (
        "    return Tensor",
        "    return 3\n    Tensor",
        r"\d+:1: `load_data` returned a va",
    ),
    "lengths": (
        "inputs[part],",
        "inputs[part][1:],",
        r"\d+:12: ValueError: `train` needs tensors ",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_file_is_told_with_its_place(mptrain: Any, mistake: str) -> None:
    old, new, said = MISTAKES[mistake]
    change(old, new)
    outcome = mptrain("plan", "plugin.yaml", "--plugin", "plugin.py")
    assert outcome.code == 2, outcome.err
    assert re.match(f"plugin.py:{said}", outcome.err), outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"x = 1\nimport os\0\n", "plugin.py:2:1: not Python: a NUL character\n"),
        (b"# \xff\xfe\nx = 1\n", "plugin.py:1:3: the byte 0xFF is not UTF-8 text\n"),
        (b"# coding: latin-1\nx = '\xe4'\n", "plugin.py:2:6: the byte 0xE4 is not UTF-8 text\n"),
        (b"x = " + b"-" * 200_000 + b"1\n", "plugin.py: not Python: "),
        (b"x = " + b"+".join([b"1"] * 50_000) + b"\n", "plugin.py: not Python: maximum recursion"),
        (b"\xef\xbb\xbfimport os; ops\n", "plugin.py:1:12: NameError: "),
    ],
)
def test_a_file_that_is_no_text_of_python(mptrain: Any, content: bytes, said: str) -> None:
    Path("plugin.py").write_bytes(content)
    outcome = mptrain("check", "plugin.yaml", "--plugin", "plugin.py")
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith(said), outcome.err
    assert outcome.err.count("plugin.py:") == 1


@pytest.mark.parametrize("beside", ["helper.py", "helper/tools.py"])
def test_a_plugin_is_one_file(mptrain: Any, beside: str) -> None:
    Path(beside).parent.mkdir(exist_ok=True)
    Path(beside).touch()
    module = beside.removesuffix(".py").replace("/", ".")
    change("import torch\n", f"import {module}\nimport torch\n")
    outcome = mptrain("check", "plugin.yaml", "--plugin", "plugin.py")
    assert outcome.code == 2
    assert re.match(r"plugin.py:\d+:1: ModuleNotFoundError: No module named 'helper'", outcome.err)
    assert "help: a plug-in is one file, of which a run keeps a copy" in outcome.err


LATE = {
    "prepare": (
        "        self.device = device",
        f"        {CRASH}",
        r"\d+:9: RuntimeError: no luck",
    ),
    "in a batch": (
        "        generator = torch.Generator()",
        "        assert step < 2, 'enough'\n        generator = torch.Generator()",
        r"\d+:\d+: AssertionError: enough",
    ),
    "a gradient": (
        '        return Batch({"inputs": inputs,',
        '        return Batch({"inputs": inputs.requires_grad_(),',
        r"\d+:1: `load_data` returned a data set whose `train_batch` gives `inputs` with a grad",
    ),
    "a batch": (
        '        return Batch({"inputs": inputs,',
        "        return 3\n        ({1: inputs,",
        r"\d+:1: `load_data` returned a data set whose `train_batch` gives a value ",
    ),
    "loss": (
        "    return cross_entropy(",
        "    assert not logits.requires_grad, 'oh'\n    return cross_entropy(",
        r"\d+:5: AssertionError: oh",
    ),
    "leaves in a batch": (
        "        generator = torch.Generator()",
        f"        {LEAVE}\n        generator = torch.Generator()",
        r"\d+:9: SystemExit: 0",
    ),
    "leaves prepare": ("        self.device = device", f"        {LEAVE}", r"\d+:9: SystemExit: 0"),
    "leaves evaluate": ("    total = correct", f"    {LEAVE}\n    total = correct", r"\d+:5: Sys"),
    "detached": (
        'reduction="sum"), b',
        'reduction="sum").detach(), b',
        r"\d+:1: `loss` returned a sum .* no gradient ",
    ),
    "decorated": (
        "def evaluate(options, model, batches):",
        "@torch.no_grad()\ndef evaluate(options, model, batches):\n    return 3\n\n\ndef e():",
        r"(\d+):1: `evaluate` returned .*\n +\1 \| @torch.no_grad\(\)\n",
    ),
    "of another file": (
        "def evaluate(",
        "from codecs import iterencode as evaluate\n\n\ndef own(",
        r" `evaluate` returned a value of type generator, not a dict$",
    ),
    "evaluate": (
        "    total = correct",
        f"    {CRASH}\n    total = correct",
        r"\d+:5: RuntimeError: no",
    ),
    "no metrics": (
        '    return {"loss": t',
        '    return {"error": t',
        r"\d+:1: `evaluate` returned ",
    ),
    "a known name": ('"accuracy": correct', '"step": correct', r"\d+:1: `evaluate` .* 'step'"),
    "a tensor": ('"accuracy": correct', '"x": logits.sum() + 0 * correct', r"\d+:1: `evaluate` "),
}


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("mistake", LATE)
def test_a_mistake_that_shows_in_training_ends_the_run_with_its_place(
    mptrain: Any, mistake: str, workers: str
) -> None:
    own_data()
    old, new, said = LATE[mistake]
    change(old, new)
    outcome = mptrain(*short("--set", f"engine.data_workers={workers}"))
    assert outcome.code == 2, outcome.err
    assert re.search(f"^plugin.py:{said}", outcome.err, re.MULTILINE), outcome.err
    assert "Traceback" not in outcome.err
    assert json.loads(Path("out/result.json").read_text())["status"] == "failed"


def test_what_the_file_prints_is_no_output_of_a_command(mptrain: Any) -> None:
    own_data()
    change("class Options", "print('at once')\n\n\nclass Options")
    change("    return Numbers", "    print('for data')\n    return Numbers")
    change("        self.device =", "        print('to prepare')\n        self.device =")
    change("    total = correct", "    print('to evaluate')\n    total = correct")
    outcome = mptrain(*short("--json"))
    assert outcome.json["status"] == "done"
    for printed in ("at once", "for data", "to prepare", "to evaluate"):
        assert printed in outcome.err


@pytest.mark.parametrize(
    ("mistake", "function"), [("evaluate", "evaluate"), ("in a batch", "train_batch")]
)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_was_raised_in_the_file_stands_in_the_log(
    mptrain: Any, mistake: str, function: str, workers: str
) -> None:
    own_data()
    old, new, _ = LATE[mistake]
    change(old, new)
    assert mptrain(*short("--set", f"engine.data_workers={workers}")).code == 2
    log = Path("out/attempts/1/log.rank0.txt").read_text()
    assert "Traceback" in log
    assert f"in {function}" in log


class Killed(BaseException):
    """Nothing of the program sees this coming."""


def killed(mptrain: Any, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Run until the process dies in the middle of a step."""
    take_step, calls = LocalEngine.step, itertools.count(1)

    def watched(self: LocalEngine) -> Any:
        if next(calls) == step:
            raise Killed
        return take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "step", watched)
        with pytest.raises(Killed):
            mptrain(*short("--set", "output.checkpoint_every=2 steps"))


@pytest.mark.parametrize("step", [1, 4, 6])
def test_killed_it_goes_on_with_the_same_file_to_the_same_bits(
    mptrain: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    own_data()
    assert mptrain(*short()).code == 0
    Path("out").rename("whole")
    killed(mptrain, monkeypatch, step)
    Path("plugin.py").unlink()
    resumed = mptrain("run", "--resume", "out", "--plugin", "out/plugin.py")
    assert resumed.code == 0, resumed.err
    final, whole = (load_file(f"{run}/final/model.safetensors") for run in ("out", "whole"))
    assert final.keys() == whole.keys()
    assert all(torch.equal(final[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_killed_by_the_system_it_goes_on_too(mptrain: Any, mptrain_process: Any) -> None:
    own_data()
    change(
        "        generator = torch.Gen",
        "        import os\n"
        "        if step == 4 and not os.path.exists('killed'):\n"
        "            open('killed', 'w').close()\n"
        "            os.kill(os.getpid(), 9)\n"
        "        generator = torch.Gen",
    )
    command = " ".join(map(shlex.quote, short("--set", "output.checkpoint_every=2 steps")))
    assert mptrain_process(f"mptrain {command}").code == -9
    resumed = mptrain_process("mptrain run --resume out --plugin plugin.py --json")
    assert resumed.json["steps_attempted"] == 6
    assert "going on from step 4" in resumed.err
    Path("out").rename("parts")
    assert mptrain(*short()).code == 0
    final, whole = (Path(run, "final/model.safetensors").read_bytes() for run in ("parts", "out"))
    assert final == whole


def test_another_file_or_none_does_not_go_on_with_the_run(
    mptrain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(mptrain, monkeypatch, 4)
    outcome = mptrain("run", "--resume", "out")
    assert outcome.code == 2
    assert "the run has a plug-in, plugin.py with the SHA-256" in outcome.err
    assert "help: add `--plugin plugin.py`, or the run's own copy: `--plugin out/plugin.py`" in (
        outcome.err
    )
    ran = Path("ran")
    Path("plugin.py").write_text(f"open({str(ran)!r}, 'w')\n" + Path("plugin.py").read_text())
    outcome = mptrain("run", "--resume", "out", "--plugin", "plugin.py")
    assert outcome.code == 2
    assert re.match(r"plugin.py: its SHA-256 is \w{64}, and the run's plug-in has", outcome.err)
    assert not ran.exists()  # it was not even run
    assert not Path("out/attempts/2").exists()


def test_a_run_without_a_plugin_takes_none(mptrain: Any, recipe: Path) -> None:
    assert mptrain("run", recipe, "--output", "out").code == 0
    outcome = mptrain("run", "--resume", "out", "--plugin", "plugin.py")
    assert (outcome.code, outcome.err.splitlines()[0]) == (
        2, "error: --plugin plugin.py: the run has no plug-in",
    )  # fmt: skip


@pytest.mark.parametrize("damage", ["", "{}", '{"file": "plugin.py", "sha256": "12"}'])
def test_a_damaged_record_of_the_plugin_is_no_leave_to_run_it(mptrain: Any, damage: str) -> None:
    assert mptrain(*short()).code == 0
    Path("out/plugin.json").write_text(damage)
    outcome = mptrain("run", "--resume", "out", "--plugin", "plugin.py")
    assert outcome.code == 2
    assert "plugin.json: says nothing about a plug-in" in outcome.err


@pytest.mark.parametrize("file", ["nothing.py", "", "."])
def test_a_file_that_cannot_be_read(mptrain: Any, file: str) -> None:
    outcome = mptrain("plan", "plugin.yaml", "--plugin", file)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_it_is_not_evaluated_on_other_data_whose_preparation_nobody_knows(mptrain: Any) -> None:
    mptrain(*short())
    outcome = mptrain("eval", "out", "--plugin", "plugin.py", "--set", "data={kind: digits}")
    assert outcome.code == 2
    assert "what a plug-in took from its training data is not known" in outcome.err
