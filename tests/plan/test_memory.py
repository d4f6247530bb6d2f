"""Memory that is planned is the memory that is needed, and what would make a recipe fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.memory import TOLERANCE, Cell, cells, measured_peak, with_data
from mpcli.cli.plan import size_in_bytes
from mpcli.plan import make_plan
from mpcli.plan.capacity import Fit, answer, changes, fitting, together
from mpcli.plan.memory import UnknownMemory, memory_of
from mpcli.plan.step import Moment, Step
from mpcli.ranks import ALONE
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recipe.fields import kinds
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan, Plan
from mpcli.tasks import task_of
from tests.small import CPU, RECIPE, small_recipe


def planned(folder: Path, *overrides: str) -> Plan:
    return make_plan(small_recipe(folder, *overrides).recipe, CPU, memory=True)


def memory(folder: Path, *overrides: str) -> MemoryPlan:
    plan = planned(folder, *overrides)
    assert plan.memory is not None, plan.memory_unknown
    return plan.memory


@pytest.mark.parametrize(
    ("mode", "weight", "master", "gradient"),
    [("fp32", 4, 0, 4), ("bf16", 4, 0, 4), ("bf16-pure", 2, 0, 2)],
)
def test_parts_are_what_a_parameter_needs(
    tmp_path: Path, mode: str, weight: int, master: int, gradient: int
) -> None:
    overrides = (f"precision.mode={mode}", "optim={kind: adamw, lr: 0.1}", "train.ema=0.9")
    plan = planned(tmp_path, *overrides)
    found = plan.memory
    assert found is not None
    number = plan.parameters
    assert (found.weights, found.masters) == (weight * number, master * number)
    assert (found.gradients, found.average) == (gradient * number, 4 * number)
    assert found.optimizer > 2 * weight * number  # and the number of steps, of each tensor
    assert found.peak_at in ("forward", "backward", "update")


def test_masters_are_copies_of_half_weights_only(tmp_path: Path) -> None:
    plan = planned(tmp_path, "precision.mode=bf16-master")
    assert plan.memory is not None
    half = sum(row.parameters for row in plan.modules if row.stored == "bf16")
    assert 0 < half < plan.parameters  # norms stay in fp32
    assert plan.memory.masters == 4 * half
    assert plan.memory.weights == 4 * plan.parameters - 2 * half


def test_frozen_and_shared_parameters_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import Tensor, nn

    from mpcli.tasks import image_classification as task

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.again = nn.Linear(64, 64)
            self.again.weight = self.first.weight
            self.frozen = nn.Linear(64, 64).requires_grad_(False)
            self.head = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.head(self.frozen(self.again(self.first(images.flatten(1)))))
            return out

    monkeypatch.setattr(task, "build_model", lambda options, info: Model())
    found = memory(tmp_path)
    learning = 64 * 64 + 64 + 64 + 64 * 10 + 10
    assert found.weights == 4 * (learning + 64 * 64 + 64)
    assert found.gradients == found.optimizer == 4 * learning


def test_micro_batches_and_checkpointing_need_less(tmp_path: Path) -> None:
    model = "task.model={kind: vit, patch_size: 2, layers: 3, width: 16, heads: 2, mlp_width: 64}"
    whole = memory(tmp_path, model)
    half = memory(tmp_path, model, "train.micro_batch_size=8")
    again = memory(tmp_path, model, "engine.activation_checkpointing=true")
    assert half.activations < 0.6 * whole.activations
    assert again.activations < 0.5 * whole.activations
    assert max(half.peak, again.peak) < whole.peak
    samples = 16 * (64 * 4 + 8)  # images and labels of the whole step
    assert half.batch == whole.batch == samples


def test_a_half_convolution_that_a_cpu_lacks_has_a_matrix_of_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = []
    for lacking in (False, True):
        monkeypatch.setattr("mpcli.plan.live._lacks", lambda _, lacking=lacking: lacking)
        peaks.append(memory(tmp_path, "precision.mode=bf16", "task.model.width=16").peak)
    assert peaks[1] - peaks[0] >= 16 * (3 * 3 * 16) * 8 * 8 * 2 / 2  # half of such a matrix


def check(one: Cell) -> None:
    assert abs(one.error) <= TOLERANCE, (one.planned, one.measured)


@pytest.mark.parametrize(
    ("mode", "accumulation"), [("fp32", 1), ("fp32", 3), ("bf16-master", 3), ("bf16-pure", 1)]
)
def test_the_peak_is_that_of_the_allocator(tmp_path: Path, mode: str, accumulation: int) -> None:
    overrides = (
        "task.model={kind: vit, patch_size: 2, layers: 3, width: 64, heads: 2, mlp_width: 128}",
        f"precision.mode={mode}",
        "optim={kind: adamw, lr: 0.01}",
        f"train={{steps: 2, global_batch_size: 24, micro_batch_size: {24 // accumulation}}}",
        "train.clip={kind: norm, max_norm: 1.0}",
    )
    loaded = small_recipe(tmp_path, *overrides)
    plan = make_plan(loaded.recipe, CPU, memory=True)
    assert plan.memory is not None
    check(Cell("vit", mode, 24, plan.memory, measured_peak(ALONE, loaded.recipe, plan)))


MATRICES = "task.model={kind: vit, patch_size: 2, layers: 2, width: 64, heads: 2, mlp_width: 128}"


@pytest.mark.parametrize("kind", kinds(Recipe.model_fields["optim"]))
def test_every_optimizers_step_is_planned(tmp_path: Path, kind: str) -> None:
    loaded = small_recipe(
        tmp_path,
        MATRICES,
        f"optim={{kind: {kind}, lr: 0.001}}",
        "train={steps: 2, global_batch_size: 2}",
    )
    plan = make_plan(loaded.recipe, CPU, memory=True)
    assert plan.memory is not None, plan.memory_unknown
    if kind in ("muon", "adafactor"):  # whose updates are as large as the weights they are for
        check(Cell("vit", "fp32", 2, plan.memory, measured_peak(ALONE, loaded.recipe, plan)))


STEP = Step(
    weights=4000,
    masters=0,
    gradients=4000,
    optimizer=8000,
    average=0,
    buffers=100,
    batch=50,
    activations=3000,
    largest_gradient=1000,
    moments=(
        Moment("forward", 0, 0, 3000, 200),
        Moment("backward", 1000, 0, 2000, 500),
        Moment("update", 4000, 0, 0, 300),
    ),
)
"""Of a thousand fp32 weights: 12,150 bytes with AdamW's state are there all the time."""


def of_an_engine(
    folder: Path, engine: str, accumulation: int = 1, device: str = "meta"
) -> MemoryPlan:
    recipe = small_recipe(folder, f"engine={{{engine}, device: cpu, processes: 2}}").recipe
    data = task_of(recipe.task).load_data(recipe.task, recipe.data)
    return memory_of(STEP, recipe, data, torch.device(device), 2, accumulation, ())


@pytest.mark.parametrize(
    ("engine", "accumulation", "peak", "peak_at"),
    [
        ("gradient_as_bucket_view: true", 1, 12150 + 4000 + 2000 + 500 + 1000, "backward"),
        ("gradient_as_bucket_view: true", 2, 12150 + 4000 + 2000 + 500 + 2 * 1000, "backward"),
        ("gradient_as_bucket_view: false", 1, 12150 + 4000 + 4000 + 300, "update"),
        ("gradient_as_bucket_view: false", 2, 12150 + 4000 + 4000 + 2500 + 1000, "backward"),
        ("gradient_compression: bf16", 1, 12150 + 4000 + 2000 + 500 + 1000 + 2000, "backward"),
    ],
)
def test_ddp_has_its_buckets_beside_a_step_of_one_process(
    tmp_path: Path, engine: str, accumulation: int, peak: int, peak_at: str
) -> None:
    found = of_an_engine(tmp_path, f"kind: ddp, {engine}", accumulation)
    assert (found.weights, found.optimizer, found.gradients) == (4000, 8000, 4000)
    assert (found.peak, found.peak_at, found.host) == (peak, peak_at, 0)


@pytest.mark.parametrize(
    ("engine", "weights", "optimizer", "host", "peak"),
    [  # buffers and batch; weights, masters, state; activations and rest; bucket, kept, gathered
        ("stage: 1", 4000, 4000, 0, 150 + 10000 + 2500 + 4000 + 4000),
        ("stage: 2", 4000, 4000, 0, 150 + 10000 + 2500 + 4000 + 2000),
        ("stage: 3", 2000, 4000, 0, 150 + 8000 + 2500 + 4000 + 2000 + 4000),
        ("stage: 1, offload: true", 4000, 0, 8000, 150 + 4000 + 2500 + 4000 + 4000),
        ("stage: 2, offload: true", 4000, 0, 8000, 150 + 4000 + 2500 + 4000 + 2000),
        ("stage: 3, offload: true", 2000, 0, 8000, 150 + 2000 + 2500 + 4000 + 2000 + 4000),
        (
            "stage: 3, offload: true, offload_parameters: true",
            *(0, 0, 10000, 150 + 2500 + 4000 + 2000 + 4000),
        ),
    ],
)
def test_zero_divides_by_its_stage_and_offload_moves_to_the_host(
    tmp_path: Path, engine: str, weights: int, optimizer: int, host: int, peak: int
) -> None:
    found = of_an_engine(tmp_path, f"kind: deepspeed, {engine}")
    assert (found.weights, found.optimizer) == (weights, optimizer)
    assert (found.peak, found.peak_at, found.host) == (peak, "backward", host)
    assert of_an_engine(tmp_path, f"kind: deepspeed, {engine}", device="cpu").peak == peak + host


@pytest.mark.verify
def test_the_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPTRAIN_DATA", str(tmp_path))
    with_data(tmp_path)
    before: Cell | None = None
    for one in cells():
        check(one)
        if before and (before.model, before.mode) == (one.model, one.mode):
            planned, measured = (
                one.planned.peak - before.planned.peak,
                one.measured - before.measured,
            )
            assert abs(planned / measured - 1) <= TOLERANCE, (before, one)
        before = one


def test_a_model_that_cannot_be_traced_backwards_is_planned_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr("mpcli.plan.memory.run_step", fail)
    plan = planned(tmp_path)
    assert (plan.memory, plan.memory_unknown) == (None, "no such kernel")


def test_divided_engines_need_less_the_more_ranks_there_are(tmp_path: Path) -> None:
    model = "task.model={kind: smallnet, width: 64}"
    many = "train.global_batch_size=64"
    peaks = [
        memory(tmp_path, model, many, f"engine={{kind: fsdp2, device: cpu, processes: {n}}}")
        for n in (2, 8)
    ]
    assert peaks[1].weights < 0.3 * peaks[0].weights
    assert peaks[1].optimizer < 0.3 * peaks[0].optimizer
    assert peaks[1].peak < peaks[0].peak
    offloaded = memory(
        tmp_path, model, many, "engine={kind: fsdp2, device: cpu, processes: 2, cpu_offload: true}"
    )
    assert offloaded.weights == offloaded.optimizer == 0
    assert offloaded.host >= peaks[0].weights + peaks[0].optimizer


def needs(**parts: int) -> MemoryPlan:
    """Of a recipe whose other parts are nothing."""
    empty = dict.fromkeys(
        ("weights", "masters", "gradients", "optimizer", "average", "buffers", "temporary"), 0
    )
    return MemoryPlan(**{**empty, "activations": 0, **parts}, peak_at="backward")


def plan_for(settings: tuple[str, ...]) -> MemoryPlan:
    """100 bytes of weights, 20 for each sample and 800 of the optimizer's state."""
    values = dict(setting.split("=", 1) for setting in settings)
    samples = int(values.get("train.micro_batch_size", 16))
    if "engine.kind" in values:
        raise UnknownMemory("not here")
    state = 200 if "optim.kind" in values else 800
    return needs(peak=100 + 20 * samples + state)


def adamw(folder: Path, *overrides: str, text: str = RECIPE) -> tuple[Recipe, Plan]:
    recipe = small_recipe(folder, "optim={kind: adamw, lr: 0.1}", *overrides, text=text).recipe
    return recipe, make_plan(recipe, CPU, memory=True)


def test_changes_that_fit_come_smallest_first(tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path, "optim={kind: adamw, lr: 0.1}")
    found = fitting(loaded.recipe, make_plan(loaded.recipe, CPU), plan_for, 1000)
    assert [change.settings for change in found] == [
        ("train.micro_batch_size=4",),
        ("optim.kind=adamw8bit", "optim.lr=0.1"),
    ]


def test_where_no_change_is_enough_several_are_together(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, "optim={kind: adamw, lr: 0.1}").recipe
    plan = make_plan(recipe, CPU)
    assert fitting(recipe, plan, plan_for, 350) == []
    change = together(recipe, plan, plan_for, 350)
    assert change is not None and change.memory.peak == 340  # 2 samples at a time
    assert change.settings == ("train.micro_batch_size=2", "optim.kind=adamw8bit", "optim.lr=0.1")
    assert together(recipe, plan, plan_for, 900) is not None


def test_a_smaller_micro_batch_that_needs_more_is_not_among_them(tmp_path: Path) -> None:
    recipe, plan = adamw(tmp_path)

    def accumulating(settings: tuple[str, ...]) -> MemoryPlan:
        whole = not any(setting.startswith("train.") for setting in settings)
        if any(setting.startswith(("optim", "precision", "engine")) for setting in settings):
            raise UnknownMemory("not here")
        return needs(peak=900 if whole else 1000)

    assert together(recipe, plan, accumulating, 100) is None
    assert answer(recipe, plan, accumulating, 100) == Fit(100, False, plan.memory.peak)


def test_several_that_fit_together_are_the_answer(tmp_path: Path) -> None:
    recipe, plan = adamw(tmp_path)
    fit = answer(recipe, plan, plan_for, 350)
    assert [change.memory.peak for change in fit.changes] == [340]
    assert (fit.least, fit.lacking) == (None, ())


def test_packages_without_which_a_change_is_not_looked_at_are_named(tmp_path: Path) -> None:
    recipe, plan = adamw(tmp_path)

    def without_package(settings: tuple[str, ...]) -> MemoryPlan:
        if any(setting.startswith("optim.kind") for setting in settings):
            raise user_error("no package", "pip install it", exit_code=Exit.ENVIRONMENT)
        return plan_for(settings)

    fit = answer(recipe, plan, without_package, 300)
    assert (fit.fits, fit.lacking) == (False, ("no package: pip install it",))


def test_offloading_steps_8_bit_state_as_adamw(tmp_path: Path) -> None:
    eight = RECIPE.replace(
        "{kind: sgd, lr: 0.1, momentum: 0.9}", "{kind: adamw8bit, lr: 0.1, eps: 1e-6}"
    )
    recipe = small_recipe(tmp_path, text=eight).recipe
    plan = make_plan(recipe, CPU)
    offered = changes(recipe, plan, lambda settings: needs(peak=1))
    engines = [c.settings for c in offered if any("engine.kind" in s for s in c.settings)]
    assert len(engines) == 2
    for settings in engines:
        assert {"optim.kind=adamw", "optim.eps=1.0e-06"} <= set(settings)
        small_recipe(tmp_path, *settings, text=eight)  # it is a recipe


def test_batchnorm_is_never_proposed_single_samples(tmp_path: Path) -> None:
    sizes = []
    for model in ("task.model.width=4", MATRICES):
        recipe, plan = adamw(tmp_path, model)
        sizes.append(changes(recipe, plan, plan_for)[0].settings)
    assert sizes == [("train.micro_batch_size=2",), ("train.micro_batch_size=1",)]


def test_another_engine_keeps_all_that_both_have(tmp_path: Path) -> None:
    own = "processes: 2, timeout_seconds: 30, max_restarts: 1, data_workers: 1, device: cpu"
    engine = f"{{kind: ddp, {own}, bucket_megabytes: 3}}"
    text = RECIPE.replace("{kind: local, device: cpu}", engine)
    recipe, plan = adamw(tmp_path, text=text)
    seen = []

    def plan_with(settings: tuple[str, ...]) -> MemoryPlan:
        changed = small_recipe(tmp_path, *settings, text=text).recipe.engine
        if changed.kind != "ddp":
            seen.append(changed)
        return needs(peak=1)

    changes(recipe, plan, plan_with)
    assert [engine.kind for engine in seen] == ["fsdp2", "deepspeed"]
    for engine in seen:
        found = engine.model_dump()
        assert found.items() >= yaml.safe_load(f"{{{own}}}").items()


def test_what_never_fits_says_how_much_it_needs(tmp_path: Path) -> None:
    recipe, plan = adamw(tmp_path)
    fit = answer(recipe, plan, plan_for, 300)
    assert (fit.fits, fit.changes) == (False, ())
    assert fit.least is not None and fit.least.memory.peak == 340
    assert plan.memory is not None
    assert answer(recipe, plan, plan_for, plan.memory.peak).fits


@pytest.mark.parametrize(
    "size", ["24", "GiB", "0GiB", "-1GiB", "many", "0.0001KB", "9" * 400 + "GiB"]
)
def test_a_capacity_is_a_size(size: str) -> None:
    with pytest.raises(UserError, match="size"):
        size_in_bytes(size)


@pytest.mark.parametrize(
    ("size", "number"), [("24GiB", 24 * 2**30), ("1.5 GB", 15 * 10**8), ("500mib", 500 * 2**20)]
)
def test_sizes_are_binary_or_decimal(size: str, number: int) -> None:
    assert size_in_bytes(size) == number
