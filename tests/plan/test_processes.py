"""How many processes train is derived, and what cannot be divided among them is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from mpcli.machine import Machine
from mpcli.plan import make_plan
from mpcli.plan.processes import ALONE, Group
from mpcli.recipe.errors import Exit, UserError
from tests.small import CPU, small_recipe

VIT = "task.model={kind: vit, patch_size: 4, layers: 1, width: 16, heads: 2, mlp_width: 16}"
EACH = pytest.mark.parametrize("kind", ["ddp", "fsdp2"])


def gpus(count: int) -> Machine:
    return Machine(cuda_devices=("x",) * count, emulated={}, unsupported={})


def engine(kind: str, **fields: object) -> str:
    values = ", ".join(f"{name}: {value}" for name, value in fields.items())
    return f"engine={{kind: {kind}{', ' if values else ''}{values}}}"


def problems(
    folder: Path, *settings: str, machine: Machine = CPU, group: Group = ALONE
) -> dict[str, tuple[str, str, Exit]]:
    """Message, hint and exit code of each error, by path."""
    with pytest.raises(UserError) as caught:
        make_plan(small_recipe(folder, *settings).recipe, machine, group=group)
    return {
        p.path: (p.what, p.hint or "", p.exit_code)
        for p in caught.value.problems
        if p.severity == "error"
    }


def warned(
    folder: Path, *settings: str, machine: Machine = CPU
) -> list[tuple[str | None, str, str]]:
    plan = make_plan(small_recipe(folder, *settings).recipe, machine)
    return [(w.finding, w.path, w.hint or "") for w in plan.warnings]


@EACH
@pytest.mark.parametrize(
    ("fields", "machine", "group", "expected"),
    [
        ({}, CPU, ALONE, 1),
        ({"device": "cpu"}, gpus(4), ALONE, 1),
        ({}, gpus(4), ALONE, 4),
        ({"processes": 2}, gpus(4), ALONE, 2),
        ({"processes": 2}, CPU, Group(nodes=2), 4),
        ({}, gpus(4), Group(nodes=2), 8),
        ({}, CPU, Group(world_size=4), 4),
        ({"processes": 2}, CPU, Group(world_size=4, nodes=2), 4),
    ],
)
def test_how_many(
    tmp_path: Path, kind: str, fields: dict[str, object], machine: Machine, group: Group,
    expected: int,
) -> None:  # fmt: skip
    plan = make_plan(small_recipe(tmp_path, engine(kind, **fields)).recipe, machine, group=group)
    assert plan.world_size == expected


@EACH
def test_a_share_and_its_micro_batches(tmp_path: Path, kind: str) -> None:
    train = "train={steps: 1, global_batch_size: 15, micro_batch_size: 3}"
    plan = make_plan(small_recipe(tmp_path, engine(kind, processes=2), train).recipe, CPU)
    assert (plan.micro_batch_size, plan.accumulation) == (3, 3)
    plan = make_plan(
        small_recipe(tmp_path, engine(kind, processes=2), "train.global_batch_size=15").recipe, CPU
    )
    assert (plan.micro_batch_size, plan.accumulation) == (8, 1)


@EACH
def test_a_batch_smaller_than_the_processes(tmp_path: Path, kind: str) -> None:
    found = problems(tmp_path, engine(kind, processes=20))
    assert set(found) == {"train.global_batch_size"}
    what, hint, code = found["train.global_batch_size"]
    assert "a batch of 16" in what and "20 processes" in what
    assert "`global_batch_size: 20`" in hint and code == Exit.USAGE


@EACH
@pytest.mark.parametrize(
    ("batch", "size", "world_size", "remedies"),
    [
        (9, 4, 2, ["micro_batch_size: 3", "global_batch_size: 8"]),
        (9, 2, 2, ["global_batch_size: 8"]),
        (9, 1, 2, ["global_batch_size: 8"]),
        (20, 6, 3, ["micro_batch_size: 5", "global_batch_size: 18"]),
    ],
)
def test_processes_that_need_different_numbers_of_micro_batches(
    tmp_path: Path, kind: str, batch: int, size: int, world_size: int, remedies: list[str]
) -> None:
    train = "train={steps: 1, global_batch_size: %d, micro_batch_size: %d}"
    setting = engine(kind, processes=world_size)
    _, hint, code = problems(tmp_path, setting, VIT, train % (batch, size))[
        "train.micro_batch_size"
    ]
    assert code == Exit.USAGE
    assert re.findall("`(.+?)`", hint) == remedies
    for field, value in (remedy.split(": ") for remedy in remedies):
        sizes = {"global_batch_size": batch, "micro_batch_size": size} | {field: int(value)}
        recipe = small_recipe(tmp_path, setting, VIT, train % tuple(sizes.values())).recipe
        assert make_plan(recipe, CPU).world_size == world_size


@EACH
def test_more_processes_than_gpus(tmp_path: Path, kind: str) -> None:
    for processes, group in ((3, ALONE), ("auto", Group(world_size=3))):
        found = problems(tmp_path, engine(kind, processes=processes), machine=gpus(2), group=group)
        what, hint, code = found["engine.processes"]
        assert "3 processes" in what and "2 GPUs" in what
        assert "processes: auto" in hint and code == Exit.ENVIRONMENT


@EACH
def test_without_any_gpu_that_is_the_problem(tmp_path: Path, kind: str) -> None:
    found = problems(tmp_path, engine(kind, device="cuda", processes=3))
    assert set(found) == {"engine.device"}


@EACH
def test_a_torch_without_nccl(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert problems(tmp_path, engine(kind), machine=gpus(1))["engine.kind"][2] == Exit.ENVIRONMENT
    make_plan(small_recipe(tmp_path, engine(kind, processes=2)).recipe, CPU)


@EACH
def test_a_group_of_another_size(tmp_path: Path, kind: str) -> None:
    group = Group(world_size=6, nodes=2)
    what, hint, code = problems(tmp_path, engine(kind, processes=2), group=group)[
        "engine.processes"
    ]
    assert "2 on each of 2 machines" in what and "6 were started" in what
    assert "processes: auto" in hint and "start 4" in hint and code == Exit.USAGE


@pytest.mark.parametrize("group", [Group(world_size=2), Group(nodes=2)])
def test_one_process_among_many(tmp_path: Path, group: Group) -> None:
    _, hint, code = problems(tmp_path, group=group)["engine.kind"]
    assert "`kind: ddp`" in hint and code == Exit.USAGE


def test_one_process_started_by_torchrun(tmp_path: Path) -> None:
    assert make_plan(small_recipe(tmp_path).recipe, CPU, group=Group(world_size=1)).world_size == 1


def test_batchnorm_over_processes_needs_gpus(tmp_path: Path) -> None:
    found = problems(tmp_path, engine("ddp", processes=2, sync_batch_norm="true"))
    assert found["engine.sync_batch_norm"][2] == Exit.USAGE


def test_all_problems_together(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        engine("ddp", processes=20, sync_batch_norm="true"),
        "precision.mode=bf16-master",
        group=Group(world_size=21),
    )
    assert set(found) == {
        *("engine.sync_batch_norm", "engine.processes", "precision.mode"),
        "train.global_batch_size",
    }


@pytest.mark.parametrize(
    ("kind", "mode", "able"),
    [
        *(("ddp", mode, "fsdp2") for mode in ("fp16-master", "bf16-master")),
        *(("fsdp2", mode, "ddp") for mode in ("fp16-pure", "bf16-pure")),
    ],
)
def test_a_mode_that_an_engine_refuses_names_one_that_does_not(
    tmp_path: Path, kind: str, mode: str, able: str
) -> None:
    found = problems(tmp_path, engine(kind), f"precision.mode={mode}")
    _, hint, code = found["precision.mode"]
    assert code == Exit.USAGE
    assert f"`kind: {able}`" in hint and f"`kind: {kind}`" not in hint


def test_what_is_only_evaluated_needs_no_processes(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, engine("fsdp2", processes=20), "precision.mode=bf16-pure")
    assert make_plan(recipe.recipe, CPU, training=False).world_size == 1


@EACH
def test_batchnorm_sees_the_samples_of_one_process(tmp_path: Path, kind: str) -> None:
    recipe = small_recipe(tmp_path, engine(kind, processes=2)).recipe
    (warning,) = make_plan(recipe, CPU).warnings
    assert (warning.finding, warning.path) == ("batchnorm-stats", "engine.kind")
    assert "8 samples" in warning.message and "2 processes" in warning.message
    assert "sync_batch_norm" not in (warning.hint or "")  # which a CPU has not
    assert warned(tmp_path, engine(kind, processes=1)) == []
    assert warned(tmp_path, engine(kind, processes=2), VIT) == []


def test_batchnorm_on_gpus_can_see_all(tmp_path: Path) -> None:
    (warning,) = warned(tmp_path, engine("ddp"), machine=gpus(4))
    assert "`sync_batch_norm: true`" in warning[2]
    assert warned(tmp_path, engine("ddp", sync_batch_norm="true"), machine=gpus(4)) == []
    (warning,) = warned(tmp_path, engine("ddp", sync_batch_norm="true"), VIT, machine=gpus(4))
    assert warning[:2] == (None, "engine.sync_batch_norm")


def test_shares_too_small_for_batchnorm_name_what_makes_them_small(tmp_path: Path) -> None:
    (warning,) = warned(tmp_path, engine("ddp", processes=8))
    assert warning[:2] == ("batchnorm-stats", "train.global_batch_size")
    (warning,) = warned(tmp_path, engine("ddp", processes=2), "train.micro_batch_size=2")
    assert warning[:2] == ("batchnorm-stats", "train.micro_batch_size")


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("kind", "field"), [("ddp", "gradient_compression"), ("fsdp2", "reduce_dtype")]
)
def test_gradients_rounded_before_they_are_added_up(
    tmp_path: Path, kind: str, field: str, half: str
) -> None:
    (warning,) = warned(tmp_path, engine(kind, **{field: half}))
    assert warning[:2] == ("half-reduction", f"engine.{field}")


def test_compression_to_the_type_that_gradients_have_loses_nothing(tmp_path: Path) -> None:
    pure = ("precision.mode=bf16-pure", "precision.stochastic_rounding=true", VIT)
    findings = {w[0] for w in warned(tmp_path, engine("ddp", gradient_compression="bf16"), *pure)}
    assert "half-reduction" not in findings
    findings = {w[0] for w in warned(tmp_path, engine("ddp", gradient_compression="fp16"), *pure)}
    assert "half-reduction" in findings


def test_more_processes_than_cores(tmp_path: Path) -> None:
    cores = Machine(cuda_devices=(), emulated={}, unsupported={}, cpus=2)
    assert warned(tmp_path, engine("ddp", processes=2), VIT, machine=cores) == []
    (warning,) = warned(tmp_path, engine("ddp", processes=4), VIT, machine=cores)
    assert warning[:2] == (None, "engine.processes")
