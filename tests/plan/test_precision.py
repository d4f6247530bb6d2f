"""The planned types of every module, and the run that has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mpcli.data.images import ImageInfo
from mpcli.machine import Machine, detect_machine
from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.records import ModulePrecision, Plan
from mpcli.tasks import image_classification as task
from tests.engines.test_modes import SmallTransformer
from tests.small import CPU, run_small, small_recipe

MODES = ["fp32", "fp16", "bf16", "fp16-master", "bf16-master", "fp16-pure", "bf16-pure"]


class Classifier(nn.Module):
    """Ten logits from a body of three."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 3, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        states: Tensor = self.lstm(images.flatten(1, 2))[0]
        return states[:, -1]


@pytest.fixture
def use_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], nn.Module]], None]:
    def use(make_body: Callable[[], nn.Module]) -> None:
        def build(options: object, info: ImageInfo) -> nn.Module:
            return Classifier(make_body())

        monkeypatch.setattr(task, "build_model", build)

    return use


def rows(plan: Plan) -> dict[str, ModulePrecision]:
    return {row.name: row for row in plan.modules}


def types(row: ModulePrecision) -> tuple[str, str, str, str]:
    return row.stored, row.computed, row.gradient, row.master


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["smallnet", "transformer"])
def test_a_run_computes_in_the_types_that_were_planned(
    tmp_path: Path, model: str, mode: str, use_model: Callable[..., None]
) -> None:
    if model == "transformer":
        use_model(SmallTransformer)
    run, result = run_small(
        tmp_path,
        f"precision={{mode: {mode}, sensitive_layers: [head]}}",
        "optim={kind: sgd, lr: 0.01}",
    )
    assert (result.status, result.problems) == ("done", ())
    observed = json.loads((run.attempt_path / "observed.json").read_text())
    plan = run.plan()
    assert {row.name for row in plan.modules} <= set(observed)
    for row in plan.modules:
        seen = observed[row.name]
        assert (row.name, seen["computed"]) == (row.name, row.computed)
        assert (row.name, seen["stored"]) == (row.name, row.stored)
        assert (row.name, seen["gradient"]) in [(row.name, row.gradient), (row.name, "-")]
    assert rows(plan)["head"].computed == observed["head"]["computed"] == "fp32"


@pytest.mark.parametrize(
    ("mode", "conv", "norm"),
    [
        ("fp32", ("fp32", "fp32", "fp32", "-"), ("fp32", "fp32", "fp32", "-")),
        ("bf16", ("fp32", "bf16", "fp32", "fp32"), ("fp32", "bf16", "fp32", "fp32")),
        ("fp16-master", ("fp16", "fp16", "fp16", "fp32"), ("fp32", "fp32", "fp32", "fp32")),
        ("bf16-pure", ("bf16", "bf16", "bf16", "-"), ("bf16", "bf16", "bf16", "-")),
    ],
)
def test_rows_say_what_the_mode_table_says(
    tmp_path: Path, mode: str, conv: tuple[str, ...], norm: tuple[str, ...]
) -> None:
    plan = make_plan(small_recipe(tmp_path, f"precision.mode={mode}").recipe, CPU)
    assert types(rows(plan)["blocks.0.conv"]) == conv
    assert types(rows(plan)["blocks.0.norm"]) == norm
    assert types(rows(plan)["loss"]) == ("-", "fp32", "-", "-")
    assert all(row.why for row in plan.modules)


def test_a_difference_from_the_plan_is_a_warning_in_the_result(
    tmp_path: Path, use_model: Callable[..., None]
) -> None:
    class Deceiving(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            planning = isinstance(images, FakeTensor)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=planning):
                return super().forward(images.flatten(1))

    use_model(lambda: Deceiving(64, 3))
    _, result = run_small(tmp_path, "precision.mode=bf16")
    assert (result.status, result.exit_code) == ("done", 0)
    (problem,) = result.problems
    assert problem["severity"] == "warning"
    assert problem["message"] == "`body` computed in fp32, planned bf16"


def problem(folder: Path, *overrides: str, machine: Machine = CPU) -> tuple[str, str, Exit]:
    with pytest.raises(UserError) as caught:
        make_plan(small_recipe(folder, *overrides).recipe, machine)
    (found,) = (p for p in caught.value.problems if p.severity == "error")
    return found.path, f"{found.what} {found.hint}", found.exit_code


@pytest.mark.parametrize("mode", MODES)
def test_patterns_that_match_nothing_are_errors_in_every_mode(tmp_path: Path, mode: str) -> None:
    patterns = '[head, "blocks.9.*"]'
    path, text, code = problem(
        tmp_path, f"precision.mode={mode}", f"precision.sensitive_layers={patterns}"
    )
    assert (path, code) == ("precision.sensitive_layers.1", Exit.USAGE)
    assert "`blocks.9.*` matches no module" in text
    assert "did you mean `blocks." in text


def test_softmax_reaches_calls_outside_modules_and_nothing_else_is_called_so(
    tmp_path: Path, use_model: Callable[..., None]
) -> None:
    settings = ("precision={mode: fp16-master, sensitive_layers: [softmax]}",)
    path, text, _ = problem(tmp_path, *settings)
    assert path == "precision.sensitive_layers.0"
    assert "`softmax` matches no module" in text
    use_model(SmallTransformer)
    plan = make_plan(small_recipe(tmp_path, *settings).recipe, CPU)
    assert "fp32" in rows(plan)["body"].computed
    plain = make_plan(small_recipe(tmp_path, "precision.mode=fp16-master").recipe, CPU)
    assert rows(plain)["body"].computed == "fp16"


def test_tf32_has_no_layers_that_are_left_out(tmp_path: Path) -> None:
    gpu = Machine(cuda_devices=("x",), emulated={}, unsupported={})
    settings = ("precision={mode: tf32, sensitive_layers: [head]}",)
    path, text, code = problem(tmp_path, *settings, "engine.device=auto", machine=gpu)
    assert (path, code) == ("precision.sensitive_layers", Exit.USAGE)
    assert "`mode: fp32`" in text


def test_tf32_does_not_exist_on_a_cpu(tmp_path: Path) -> None:
    path, text, code = problem(tmp_path, "precision.mode=tf32", machine=detect_machine())
    assert (path, code) == ("precision.mode", Exit.ENVIRONMENT)
    assert "tf32" in text


@pytest.mark.parametrize("mode", ["fp16", "fp16-master", "fp16-pure"])
def test_what_a_device_emulates_is_warned_of_in_every_mode_that_uses_it(
    tmp_path: Path, mode: str
) -> None:
    machine = replace(CPU, emulated={"cpu": frozenset({"fp16"})})
    plan = make_plan(small_recipe(tmp_path, f"precision.mode={mode}").recipe, machine)
    assert any(w.path == "precision.mode" and "fp16" in w.message for w in plan.warnings)


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_an_lstm_that_a_cpu_lacks_is_an_island_and_trains(
    tmp_path: Path, mode: str, use_model: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_model(Recurrent)
    recipe = small_recipe(tmp_path, f"precision.mode={mode}").recipe
    broken = replace(CPU, broken_lstm={"cpu": frozenset({mode})})
    row = rows(make_plan(recipe, broken))["body.lstm"]
    assert row.computed == "fp32"
    assert row.why == f"autocast has no {mode} LSTM on this cpu"
    monkeypatch.setattr("tests.small.CPU", detect_machine())
    _, result = run_small(tmp_path, f"precision.mode={mode}")
    assert (result.status, result.problems) == ("done", ())


@pytest.mark.parametrize(
    ("settings", "findings"),
    [
        (["precision.mode=bf16-pure"], {"lost-updates", "norm-in-half"}),
        (
            ["precision={mode: bf16-pure, stochastic_rounding: true, sensitive_layers: [norm]}"],
            set(),
        ),
        (
            ["precision.mode=fp16-pure", "optim={kind: adam, lr: 0.01}"],
            {"lost-updates", "norm-in-half", "adam-eps"},
        ),
        (
            ["precision.mode=fp16-pure", "optim={kind: adamw, lr: 0.01, eps: 1e-4}"],
            {"lost-updates", "norm-in-half"},
        ),
        (["precision.mode=fp16-master", "optim={kind: adam, lr: 0.01}"], set()),
        (
            ["precision={mode: fp16, loss_scale: {kind: scheduled, points: [[0, 0.5]]}}"],
            {"underflow"},
        ),
        (
            ["precision={mode: fp16, loss_scale: {kind: scheduled, points: [[0, 1], [9, 1e9]]}}"],
            {"scale-too-high"},
        ),
        (
            [
                "precision={mode: fp16, loss_scale: {kind: dynamic, init_scale: 1e30,"
                " min_scale: 1e30, max_scale: 1e31}}"
            ],
            {"scale-too-high"},
        ),
        (
            [
                "precision={mode: fp16, loss_scale: {kind: dynamic, init_scale: 1e-4,"
                " min_scale: 1e-5, max_scale: 1e-4}}"
            ],
            {"underflow"},
        ),
        (["precision.mode=fp16"], set()),
    ],
)
def test_dangers_that_the_recipe_shows(
    tmp_path: Path, settings: list[str], findings: set[str]
) -> None:
    plan = make_plan(small_recipe(tmp_path, *settings).recipe, CPU)
    assert {warning.finding for warning in plan.warnings} == findings


@pytest.mark.parametrize("mode", ["bf16", "bf16-master", "fp16-pure"])
def test_a_layer_that_its_parent_computes_needs_its_parent(
    tmp_path: Path, mode: str, use_model: Callable[..., None]
) -> None:
    use_model(SmallTransformer)
    alone = f"precision={{mode: {mode}, sensitive_layers: [head, '*.out_proj']}}"
    path, text, code = problem(tmp_path, alone)
    assert (path, code) == ("precision.sensitive_layers.1", Exit.USAGE)
    assert "list `body.layer.self_attn`" in text
    both = f"precision={{mode: {mode}, sensitive_layers: [MultiheadAttention, '*.out_proj']}}"
    _, result = run_small(tmp_path, both, "optim={kind: sgd, lr: 0.01}")
    assert (result.status, result.problems) == ("done", ())


def test_the_plan_says_where_a_fused_softmax_is(
    tmp_path: Path, use_model: Callable[..., None]
) -> None:
    use_model(SmallTransformer)
    plan = make_plan(small_recipe(tmp_path, "precision.mode=bf16-master").recipe, CPU)
    assert "its softmax is fp32 inside" in rows(plan)["body.layer.self_attn"].why


@pytest.mark.parametrize(("beta2", "warned"), [(0.999, True), (0.99, False)])
def test_moments_that_bf16_cannot_lower_are_warned_of(
    tmp_path: Path, beta2: float, warned: bool
) -> None:
    settings = ("precision={mode: bf16-pure, stochastic_rounding: true, sensitive_layers: [norm]}",)
    adam = f"optim={{kind: adam, lr: 0.01, betas: [0.9, {beta2}]}}"
    plan = make_plan(small_recipe(tmp_path, *settings, adam).recipe, CPU)
    assert [w.path for w in plan.warnings] == (["optim.betas"] if warned else [])


def test_a_product_of_two_types_is_refused_before_it_runs(
    tmp_path: Path, use_model: Callable[..., None]
) -> None:
    class Prototypes(nn.Module):
        """Uses the weights of a module that it does not run."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)
            self.prototypes = nn.Embedding(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            similarities: Tensor = self.layer(images.flatten(1)) @ self.prototypes.weight.T
            return similarities

    use_model(Prototypes)
    _, result = run_small(tmp_path, "precision.mode=fp16-master")
    assert result.status == "done"
    sensitive = "precision={mode: fp16-master, sensitive_layers: [embedding]}"
    path, text, code = problem(tmp_path, sensitive)
    assert (path.split(".")[0], code) == ("precision", Exit.USAGE)
    assert "`body" in text
