"""Memory that is too small: a micro-batch that fits is found, or half of one is tried."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError  # type: ignore[attr-defined]

from mpcli.cli.app import main
from mpcli.engines.local import LocalEngine
from mpcli.launch import _same_processes, ended_by, launch
from mpcli.machine import Machine, _cgroup_room, detect_machine
from mpcli.plan import make_plan, micro_batch
from mpcli.plan.capacity import Change
from mpcli.plan.micro_batch import halved, needed, trial
from mpcli.plan.processes import Group
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import load_plugin
from mpcli.records import MemoryPlan, Plan, Result, StepRecord
from mpcli.rundir import RunDirectory
from mpcli.sizes import size_text
from tests.small import CPU, Silent, small_recipe

PLUGIN = Path(__file__).parent / "short_of_memory.py"
SHORT = """\
name: short
task: {kind: plugin, most: %d}
data: {kind: plugin}
precision: {mode: fp32}
optim: {kind: adamw, lr: 0.01}
train: {steps: 8, global_batch_size: 16}
eval: {every: 2 steps}
engine: {kind: local, device: cpu}
output: {checkpoint_every: 2 steps}
"""
PLENTY = 1000


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the precisions, which takes a second for each attempt."""
    monkeypatch.setattr("mpcli.launch.environment", dict)
    monkeypatch.setattr("mpcli.launch.changes", lambda *_: [])


class Heard(Silent):
    """A display that remembers messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def short_run(
    folder: Path, most: int, *overrides: str, name: str = "run"
) -> tuple[RunDirectory, Result, list[str]]:
    """Train the plug-in in this process; what it told too."""
    plugin = load_plugin(str(PLUGIN))
    path = folder / "short.yaml"
    path.write_text(SHORT % most)
    loaded = load_recipe(path, overrides, plugin)
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, folder / name)
    display = Heard()
    return run, launch(run, display, plugin), display.messages


def plans(run: RunDirectory) -> list[Plan]:
    """Of the attempts, the first one first."""
    folders = sorted((run.path / "attempts").iterdir(), key=lambda folder: int(folder.name))
    return [Plan.model_validate_json((folder / "plan.json").read_text()) for folder in folders]


def reasons(run: RunDirectory, attempt: int) -> list[str]:
    text = (run.path / f"attempts/{attempt}/resumed.json").read_text()
    found: list[str] = json.loads(text)["changes"]
    return found


def rows(run: RunDirectory) -> list[StepRecord]:
    return list(run.steps())


def test_half_the_micro_batch_goes_on_from_the_checkpoint_with_the_same_losses(
    tmp_path: Path,
) -> None:
    whole, _, _ = short_run(tmp_path, PLENTY, name="whole")
    run, result, told = short_run(tmp_path, 7, "task.begins=6")
    assert (result.status, result.steps_attempted) == ("done", 8)
    assert [plan.micro_batch_size for plan in plans(run)] == [16, 8, 4]
    assert [plan.accumulation for plan in plans(run)] == [1, 2, 4]
    assert [row.attempt for row in rows(run)] == [1] * 4 + [3] * 4
    for row, other in zip(rows(run), rows(whole), strict=True):
        assert row.loss == pytest.approx(other.loss, abs=1e-6)
    (why,) = reasons(run, 3)
    assert why == (
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.; micro-batches of 4 "
        "instead of 8"
    )
    assert [line for line in told if "out of memory" in line][1:] == [f"{why} (attempt 3)"]
    assert "micro_batch_size: null" in run.recipe_path.read_text()
    assert result.problems == ()


def test_a_resume_keeps_the_smaller_micro_batch_until_it_is_told_otherwise(
    tmp_path: Path,
) -> None:
    run, _, _ = short_run(tmp_path, 7)
    for override in ("train.steps=10", "train.steps=12"):
        arguments = ["run", "--resume", str(run.path), "--plugin", str(PLUGIN)]
        if override.endswith("12"):
            arguments += ["--set", "train.micro_batch_size=2"]
        assert main([*arguments, "--set", override]) == 0
    assert [plan.micro_batch_size for plan in plans(run)] == [16, 8, 4, 4, 2]
    assert "micro-batches of 4 instead of 16: there was no memory for more" in reasons(run, 4)


def test_without_a_checkpoint_the_run_begins_again(tmp_path: Path) -> None:
    run, result, _ = short_run(tmp_path, 8, "output.checkpoint_every=null", "task.begins=4")
    assert result.status == "done"
    assert [(row.step, row.attempt) for row in rows(run)] == [(step, 2) for step in range(1, 9)]


def test_an_evaluation_without_memory_is_made_in_smaller_parts(tmp_path: Path) -> None:
    run, result, _ = short_run(tmp_path, 8, "task.evaluation=true", "task.begins=2")
    assert result.status == "done"
    assert [row.step for row in run.evaluations()] == [2, 4, 6, 8]
    assert [row.attempt for row in run.evaluations()] == [1, 2, 2, 2]


def test_batchnorm_sees_other_samples_and_never_one(tmp_path: Path) -> None:
    run, result, told = short_run(tmp_path, 0, "task.batch_norm=true")
    assert result.exit_code == 3
    assert [plan.micro_batch_size for plan in plans(run)] == [16, 8, 4, 2]
    assert "BatchNorm's statistics are of 8 samples from here on (attempt 2)" in "".join(told)


def test_nothing_of_the_attempt_without_memory_is_left_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[LocalEngine]] = []
    alive: list[int] = []
    begin = LocalEngine.__init__

    def counted(engine: LocalEngine, *args: Any, **options: Any) -> None:
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(engine))
        begin(engine, *args, **options)

    monkeypatch.setattr(LocalEngine, "__init__", counted)
    short_run(tmp_path, 4, "task.begins=3")
    assert len(alive) >= 3 and not any(alive)  # plans make some too


def test_memory_that_one_sample_does_not_fit_ends_the_run_with_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changes(recipe: Any, size: int, plan_for: Any) -> list[Change]:
        settings = ("train.global_batch_size=8",)
        return [Change("a smaller batch", settings, plan_for(settings))]

    monkeypatch.setattr("mpcli.launch.changes", changes)
    run, result, _ = short_run(tmp_path, 0)
    assert (result.status, result.exit_code) == ("failed", 3)
    assert [plan.micro_batch_size for plan in plans(run)] == [16, 8, 4, 2, 1]
    assert (result.reason or "").startswith("out of memory: ")
    problem, parts, *_ = result.problems
    assert (problem["path"], problem["finding"]) == ("train.micro_batch_size", "out-of-memory")
    plan = plans(run)[-1]
    memory = needed(load_recipe(run.recipe_path, plugin=load_plugin(str(PLUGIN))).recipe, plan)
    assert memory and memory.weights == 4 * plan.parameters
    assert parts["message"].startswith(f"planned: weights {size_text(memory.weights)}, ")
    assert parts["message"].endswith(f"peak {size_text(memory.peak)} in {memory.peak_at}")
    assert (parts["hint"] or "").startswith("a smaller batch: ")


def test_what_a_cpu_lacks_is_told_by_its_allocator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(engine: LocalEngine) -> None:
        raise RuntimeError("[enforce fail at alloc] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(LocalEngine, "step", full)
    run, result, _ = short_run(tmp_path, PLENTY, "train.micro_batch_size=2")
    assert (result.exit_code, len(plans(run))) == (3, 2)


CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:1331, unhandled cuda error (run with NCCL_DEBUG=INFO for "
    "details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 '%s'"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously ..."),
        RuntimeError(CUBLAS),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        DistBackendError(NCCL % "out of memory"),
    ],
    ids=["torch", "CUDA", "cuBLAS", "cuDNN", "NCCL"],
)
def test_what_a_gpu_lacks_is_told_by_the_library_that_needs_it(error: Exception) -> None:
    ending = ended_by(error, training=True)
    assert (ending.exit_code, ending.problems[0].finding) == (3, "out-of-memory")


def test_a_loss_of_another_rank_or_another_error_is_no_lack_of_memory() -> None:
    lost = ended_by(DistBackendError(NCCL % "invalid argument"), training=True)
    assert (lost.exit_code, lost.problems[0].finding) == (Exit.DISTRIBUTED, None)
    other = ended_by(RuntimeError(CUBLAS.replace("ALLOC_FAILED", "NOT_INITIALIZED")))
    assert other.exit_code == Exit.BUG


def test_sizes_are_read_at_a_glance() -> None:
    sizes = [size_text(number) for number in (0, 1000, 2**20, 1023 * 2**20, 1234567890)]
    assert sizes == ["0B", "1000B", "1MiB", "1023MiB", "1.15GiB"]


def test_memory_that_is_missing_before_the_first_step_is_not_the_micro_batchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("mpcli.trainer.build_engine", full)
    run, result, _ = short_run(tmp_path, PLENTY)
    assert (result.exit_code, len(plans(run))) == (3, 1)
    problem, parts = result.problems
    assert problem["path"] == "engine.device"
    assert parts["message"].startswith("planned: weights ")
    # What was planned afterwards was no engine of the run.
    assert "optimizer state: " not in (run.attempt_path / "log.rank0.txt").read_text()


@pytest.mark.parametrize(
    ("processes", "world_size", "nodes"), [("2", 4, 2), ("4", 4, 1), ("auto", 4, 1)]
)
def test_what_would_help_is_planned_for_as_many_processes(
    tmp_path: Path, processes: str, world_size: int, nodes: int
) -> None:
    engine = f"engine={{kind: ddp, processes: {processes}, device: cpu}}"
    recipe = small_recipe(tmp_path, engine).recipe
    group = Group(world_size, nodes)
    plan = make_plan(recipe, CPU, group=group)
    assert _same_processes(recipe, plan, CPU) == group


def planned(folder: Path, *settings: str) -> tuple[Any, Plan]:
    recipe = small_recipe(folder, *settings).recipe
    return recipe, make_plan(recipe, CPU)


@pytest.mark.parametrize(
    ("engine", "train", "sizes"),
    [
        ("local", (16, 16), [16, 8, 4, 2]),
        ("local", (15, 15), [15, 8, 4]),  # of seven times 2 BatchNorm would have one sample left
        ("ddp, processes: 2", (16, 5), [5, 3, 2]),
        ("fsdp2, processes: 3", (20, 7), [7, 4]),  # 7 and 6 are as many parts of 4, not of less
    ],
)
def test_halves_leave_all_processes_as_many_micro_batches(
    tmp_path: Path, engine: str, train: tuple[int, int], sizes: list[int]
) -> None:
    batch, size = train
    settings = f"train={{steps: 1, global_batch_size: {batch}, micro_batch_size: {size}}}"
    recipe, plan = planned(tmp_path, settings, f"engine={{kind: {engine}, device: cpu}}")
    found = [plan.micro_batch_size]
    while smaller := halved(recipe, plan):
        plan = smaller
        found.append(plan.micro_batch_size)
        train_section = recipe.train.model_copy(update={"micro_batch_size": found[-1]})
        same = make_plan(recipe.model_copy(update={"train": train_section}), CPU)
        assert (same.micro_batch_size, same.accumulation) == (found[-1], plan.accumulation)
    assert found == sizes


def test_a_static_graph_cannot_accumulate(tmp_path: Path) -> None:
    engine = "engine={kind: ddp, processes: 2, static_graph: true, device: cpu}"
    assert halved(*planned(tmp_path, engine)) is None


AUTO = "train.micro_batch_size=auto"


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """What a step is planned to need: so much in any case, and so much for each sample."""

    def set_to(always: int, each: int) -> None:
        def plan_memory(
            recipe: Any, data: Any, device: Any, world_size: int, micro_batch: int, *rest: Any
        ) -> MemoryPlan:
            parts = dict.fromkeys(
                ("weights", "masters", "gradients", "optimizer", "average", "buffers"), 0
            )
            activations = each * micro_batch
            return MemoryPlan(
                **parts, activations=activations, temporary=always, peak=always + activations,
                peak_at="forward",
            )  # fmt: skip

        monkeypatch.setattr(micro_batch, "plan_memory", plan_memory)

    return set_to


def with_memory(**free: int | None) -> Machine:
    return Machine(cuda_devices=(), emulated={}, unsupported={}, available_memory=free)


@pytest.mark.parametrize(
    ("engine", "free", "size"),
    [
        ("local", 2000, 16),  # 100 + 16 * 90 are 1,540 of 1,600
        ("local", 1900, 8),
        ("local", None, 16),
        ("ddp, processes: 2", 2 * 1000, 4),
        ("fsdp2, processes: 2", 2 * 1100, 8),
    ],
)
def test_on_a_cpu_the_largest_whose_peak_fits_four_fifths_is_chosen(
    tmp_path: Path, needs: Callable[[int, int], None], engine: str, free: int | None, size: int
) -> None:
    needs(100, 90)
    recipe = small_recipe(tmp_path, AUTO, f"engine={{kind: {engine}, device: cpu}}").recipe
    plan = make_plan(recipe, with_memory(cpu=free))
    assert plan.micro_batch_size == size
    assert plan.micro_batch_size * plan.accumulation * plan.world_size == 16


def test_what_fits_no_memory_is_refused_where_it_is_trained(
    tmp_path: Path, needs: Callable[[int, int], None]
) -> None:
    needs(5000, 1)
    recipe = small_recipe(tmp_path, AUTO).recipe
    with pytest.raises(UserError, match="has none for a micro-batch of 2 samples") as caught:
        make_plan(recipe, with_memory(cpu=2000))
    assert caught.value.exit_code == 3
    (problem,) = caught.value.problems
    assert problem.path == "train.micro_batch_size"
    assert "may fill 1.562KiB" in problem.what and "--capacity 1.562KiB" in str(problem.hint)
    assert make_plan(recipe, with_memory(cpu=2000), training=False).micro_batch_size == 2


def test_without_auto_no_memory_is_planned(tmp_path: Path, needs: Callable[[int, int], None]):
    needs(5000, 1)
    plan = make_plan(small_recipe(tmp_path).recipe, with_memory(cpu=2000))
    assert plan.micro_batch_size == 16


@pytest.mark.parametrize(
    ("engine", "sizes"),
    [("local", [8, 4, 2]), ("ddp", [4, 2])],  # 800 of 850 are too near for what is not tried
)
def test_on_a_gpu_it_is_tried_from_the_largest_that_is_planned_to_fit(
    tmp_path: Path,
    needs: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    sizes: list[int],
) -> None:
    tried = []

    def fails_above_two(recipe: Any, device: Any, world_size: int, size: int, *rest: Any) -> bool:
        tried.append(size)
        return size <= 2

    monkeypatch.setattr(micro_batch, "trial", fails_above_two)
    needs(0, 100)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    recipe = small_recipe(tmp_path, AUTO, f"engine={{kind: {engine}, device: cuda}}").recipe
    gpu = Machine(
        cuda_devices=("x",), emulated={}, unsupported={}, available_memory={"cuda": 850, "cpu": 1}
    )
    assert make_plan(recipe, gpu).micro_batch_size == 2
    assert tried == sizes


@pytest.mark.parametrize("phase", ["accumulate", "step"])
def test_a_trial_says_whether_two_steps_find_their_memory_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    recipe, plan = planned(tmp_path)
    arguments = (plan.steps, plan.fp32_modules)
    device = torch.device("cpu")
    before = torch.get_rng_state()
    assert trial(recipe, device, 1, 8, *arguments)
    assert torch.equal(before, torch.get_rng_state())

    engines: list[weakref.ref[LocalEngine]] = []

    def full(engine: LocalEngine, *args: Any, **options: Any) -> None:
        engines.append(weakref.ref(engine))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LocalEngine, phase, full)
    assert not trial(recipe, device, 1, 8, *arguments)
    assert [engine() for engine in engines] == [None]
    monkeypatch.setattr(LocalEngine, phase, lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trial(recipe, device, 1, 8, *arguments)


def test_this_machine_says_how_much_is_free() -> None:
    free = detect_machine().available_memory
    assert (free["cpu"] or 0) > 2**20


def control_group(folder: Path, names: tuple[str, str, str], limit: str, used: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limits, usage, cached = names
    (folder / limits).write_text(f"{limit}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 3\n{cached} 100\nshmem 7\n")


TWO = ("memory.max", "memory.current", "inactive_file")
ONE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_the_room_of_a_control_group_is_that_of_the_fullest_above_it(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/user/job\n")
    root = tmp_path / "fs"
    assert _cgroup_room(root, own) is None
    control_group(root / "user/job", TWO, "max", 4000)
    assert _cgroup_room(root, own) is None
    control_group(root / "user", TWO, "9000", 5000)
    assert _cgroup_room(root, own) == 4100
    control_group(root / "user/job", TWO, "5000", 4000)
    assert _cgroup_room(root, own) == 1100
    control_group(tmp_path, TWO, "10", 4000)  # above the hierarchy
    assert _cgroup_room(root, own) == 1100


def test_control_groups_of_the_first_version_have_a_folder_for_memory(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    root = tmp_path / "fs"
    control_group(root / "memory", ONE, "3000", 1000)  # as a container sees its own
    assert _cgroup_room(root, own) == 2100
    assert _cgroup_room(root, tmp_path / "nothing") is None
