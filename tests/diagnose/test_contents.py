"""What is found in good files, folders and checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from mpcli.diagnose.contents import file_facts, folder_facts
from mpcli.diagnose.facts import Facts
from mpcli.diagnose.places import gather
from mpcli.recipe.errors import Exit, UserError
from tests.checkpoints import small

WEIGHTS = {
    "a.weight": torch.tensor([[1.0, 1e-9], [0.0, -3.0]]),
    "a.bias": torch.tensor([0.5, 0.25]),
    "b.scale": torch.tensor([1e5]),
    "b.count": torch.tensor(3),
}


def names(evidence: Facts) -> list[str]:
    assert evidence.weights
    return [tensor.name for tensor in evidence.weights.tensors]


def check(evidence: Facts) -> None:
    """That the facts are those of `WEIGHTS`."""
    weights = evidence.weights
    assert weights
    assert sorted(names(evidence)) == ["a.bias", "a.weight", "b.scale"]
    assert weights.not_examined == {"b.count": "int64"}
    assert weights.total.elements == 7
    assert weights.total.formats["fp16"].above == weights.total.formats["fp16"].below == 1 / 6
    assert weights.verdict == "needs bf16"
    headroom = {layer.name: layer.headroom_bits for layer in weights.layers}
    assert headroom == {"a": math.log2(65520 / 3), "b": math.log2(65520 / 1e5)}


def test_a_file_of_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(WEIGHTS, path)
    check(file_facts(path))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_of_today_and_of_old(tmp_path, suffix, zipped):
    path = (tmp_path / "x").with_suffix(suffix)
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    check(file_facts(path))


def test_a_state_dict_and_a_parameter_are_read_too(tmp_path):
    model = nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    torch.save(model.weight, tmp_path / "weight.pt")
    assert names(file_facts(tmp_path / "x.pt")) == ["weight", "bias"]
    assert names(file_facts(tmp_path / "weight.pt")) == ["weight"]


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1.0, 0.0, 2.0]]))[0, 0].backward()
    optimizer.step()
    return model, optimizer


SCALER = {
    "scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
    "_growth_tracker": 7,
}  # fmt: skip


def test_a_whole_training_checkpoint_is_taken_apart(tmp_path):
    model, optimizer = stepped()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg_sq"][0, 0] = math.inf
    state["state"][1]["exp_avg_sq"].zero_()
    whole = {"epoch": 3, "model": model.state_dict(), "optim": state, "scaler": SCALER}
    torch.save(whole, tmp_path / "x.pt")
    found = file_facts(tmp_path / "x.pt")
    assert names(found) == ["model.weight", "model.bias"]
    assert found.optimizer and found.scaler
    states = {state.key: state for state in found.optimizer.states}
    assert set(states) == {"step", "exp_avg", "exp_avg_sq"}
    assert states["exp_avg_sq"].nonfinite == ("0",)
    assert states["exp_avg_sq"].zero == ("1",)
    assert (states["exp_avg_sq"].inf, states["exp_avg"].inf) == (1, 0)
    assert (found.scaler.scale, found.scaler.growth_tracker) == (1024.0, 7)
    assert found.scaler.growth_interval == 2000


def test_tied_tensors_count_once(tmp_path):
    weight = torch.ones(4, 2)
    torch.save({"embedding": weight, "head": weight, "view": weight[:2]}, tmp_path / "x.bin")
    weights = file_facts(tmp_path / "x.bin").weights
    assert weights
    assert weights.tied == {"head": "embedding"}
    assert weights.total.elements == 8 + 4


def test_what_expand_repeats_counts_once(tmp_path):
    torch.save({"x": torch.ones(1).expand(2**40)}, tmp_path / "x.pt")
    weights = file_facts(tmp_path / "x.pt").weights
    assert weights
    assert weights.total.elements == 1


def test_types_are_told_and_what_a_type_lost_is_not_claimed(tmp_path):
    mixed = {"a.w": torch.ones(2).half(), "b.w": torch.full((2,), 1e-9), "c.w": torch.ones(2)}
    safetensors.torch.save_file(mixed, tmp_path / "x.safetensors")
    weights = file_facts(tmp_path / "x.safetensors").weights
    assert weights
    assert weights.total.dtypes == {"fp16": 2, "fp32": 4}
    halves = {layer.name: layer.formats["fp16"] for layer in weights.layers}
    assert halves["a"].below is None and halves["a"].above is None
    assert halves["b"].below == 1.0


def test_values_that_are_not_finite_come_first_in_the_verdict(tmp_path):
    bad = {"a.w": torch.tensor([1.0, math.nan]), "b.w": torch.ones(2)}
    safetensors.torch.save_file(bad, tmp_path / "x.safetensors")
    weights = file_facts(tmp_path / "x.safetensors").weights
    assert weights
    assert weights.verdict == "NaN or infinity in these layers: [a]; fits fp16"
    assert weights.nonfinite_layers == ("a",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as a Hugging Face Trainer writes it."""
    path = tmp_path / "checkpoint-6"
    path.mkdir()
    safetensors.torch.save_file(WEIGHTS, path / "model.safetensors")
    torch.save(stepped()[1].state_dict(), path / "optimizer.pt")
    torch.save(SCALER, path / "scaler.pt")
    log = [
        {"step": 5, "loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1, "epoch": 0.5},
        {"step": 6, "loss": math.nan, "learning_rate": 0.1},
        {"step": 6, "eval_loss": 1.0},
    ]
    state = {"global_step": 6, "max_steps": 10, "epoch": 0.6, "log_history": log, "other": None}
    (path / "trainer_state.json").write_text(json.dumps(state, indent=2))
    for name in ("training_args.bin", "rng_state.pth", "scheduler.pt"):
        (path / name).write_bytes(b"never looked at")
    (path / "config.json").write_text("{}")
    return path


def test_a_hugging_face_checkpoint_is_read_and_what_is_not_read_is_named(folder):
    found = gather(folder).facts
    check(found)
    assert found.optimizer and found.scaler and found.trainer
    assert found.trainer.global_step == 6
    assert [row.step for row in found.trainer.last] == [5, 6]
    assert found.trainer.first_nonfinite == found.trainer.last[1]
    left = ["training_args.bin", "rng_state.pth", "scheduler.pt"]
    assert [entry.file for entry in found.not_read] == left


def test_sharded_weights_are_those_that_the_index_names(folder):
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": ["a.weight", "a.bias"], "b.safetensors": ["b.scale", "b.count"]}
    for file, keys in parts.items():
        safetensors.torch.save_file({key: WEIGHTS[key] for key in keys}, folder / file)
    index = {key: file for file, keys in parts.items() for key in keys}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    safetensors.torch.save_file(WEIGHTS, folder / "other.safetensors")
    found = folder_facts(folder)
    check(found)
    assert "other.safetensors" in [entry.file for entry in found.not_read]


def test_pickles_are_read_where_there_are_no_safetensors(folder):
    torch.save({"x": torch.ones(3)}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in [entry.file for entry in folder_facts(folder).not_read]
    (folder / "model.safetensors").unlink()
    assert names(folder_facts(folder)) == ["x"]


def test_a_snapshot_of_the_hugging_face_cache_is_links_to_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file(WEIGHTS, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    check(gather(snapshot).facts)


def test_one_of_our_checkpoints(tmp_path):
    found = gather(small(tmp_path / "checkpoints").path).facts
    assert found.kind == "checkpoint"
    assert sorted(names(found)) == ["bf16", "half", "weight"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "holds no run and no weights, but nothing"),
        (lambda path: path.write_text("x"), "is no file of weights"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nothing"),
        (lambda path: (path / "checkpoint-12").mkdir(parents=True), "but checkpoint-12"),
    ],
)
def test_of_anything_else_it_is_said_what_was_found(tmp_path, make, said):
    path = tmp_path / "it"
    make(path)
    with pytest.raises(UserError, match=said) as caught:
        gather(path)
    assert caught.value.exit_code == Exit.USAGE
    if "checkpoint-12" in said:
        assert "checkpoint-12` is its newest checkpoint" in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize("name", ["training_args.bin", "rng_state.pth", "rng_state_1.pth"])
def test_what_is_never_read_is_not_read_alone_either(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="is not read"):
        gather(tmp_path / name)


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_of_several_models_in_a_folder_none_is_chosen(tmp_path, form):
    for name in ("best", "last"):
        path = tmp_path / f"{name}.{form}"
        save = safetensors.torch.save_file if form == "safetensors" else torch.save
        save(WEIGHTS, path)
    with pytest.raises(UserError, match="2 files may have the weights") as caught:
        gather(tmp_path)
    assert caught.value.exit_code == Exit.USAGE
    assert caught.value.problems[0].hint == f"name one of: `best.{form}`, `last.{form}`"
    check(gather(path).facts)


def test_an_index_may_have_another_name(tmp_path):
    shards = {"a.safetensors": ["a.weight", "a.bias"], "b.safetensors": ["b.scale", "b.count"]}
    for file, keys in shards.items():
        safetensors.torch.save_file({key: WEIGHTS[key] for key in keys}, tmp_path / file)
    index = {key: file for file, keys in shards.items() for key in keys}
    for name in ("diffusion.safetensors.index.json", "other.safetensors.index.json"):
        (tmp_path / name).write_text(json.dumps({"weight_map": index}))
        if name.startswith("diffusion"):
            check(gather(tmp_path).facts)
    with pytest.raises(UserError, match="2 files may have the weights"):
        gather(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_shard_hides_no_tensor_of_another_one(tmp_path, form):
    save = safetensors.torch.save_file if form == "safetensors" else torch.save
    save({"a": torch.tensor([math.nan]), "b": torch.ones(1)}, tmp_path / f"1.{form}")
    save({"a": torch.ones(1)}, tmp_path / f"2.{form}")
    whole = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    index = {"b": f"1.{form}", "a": f"2.{form}"}
    (tmp_path / f"{whole}.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match="it has `a`, and so has what was read before") as caught:
        gather(tmp_path)
    assert caught.value.exit_code == Exit.CHECKPOINT


def test_what_lay_where_another_shard_lies_in_memory_is_not_tied_to_it(tmp_path):
    index = {}
    for number in range(4):  # as large as what is mapped, so that the next one takes its place
        name, value = f"layer{number}.weight", math.nan if number == 3 else 1.0
        torch.save({name: torch.full((1000, 1000), value)}, tmp_path / f"{number}.bin")
        index[name] = f"{number}.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    weights = folder_facts(tmp_path).weights
    assert weights
    assert (weights.tied, weights.total.nan) == ({}, 10**6)


def test_keys_that_are_no_names_hide_no_tensor(tmp_path):
    values = {(0, 1): torch.tensor([math.nan]), (0, 2): torch.ones(1)}
    torch.save(values, tmp_path / "x.pt")
    assert names(file_facts(tmp_path / "x.pt")) == ["?0", "?1"]


def test_a_layer_without_finite_values_fits_nothing(tmp_path):
    bad = {"a.w": torch.full((2,), math.nan), "b.w": torch.ones(2)}
    safetensors.torch.save_file(bad, tmp_path / "x.safetensors")
    weights = file_facts(tmp_path / "x.safetensors").weights
    assert weights
    assert [layer.fits for layer in weights.layers] == [None, {"fp16": True, "bf16": True}]
    assert weights.verdict == "NaN or infinity in these layers: [a]; fits fp16"
    safetensors.torch.save_file({"a.w": bad["a.w"]}, tmp_path / "x.safetensors")
    weights = file_facts(tmp_path / "x.safetensors").weights
    assert weights
    assert weights.dtype is None
    assert weights.verdict == "NaN or infinity in these layers: [a]; no finite values"


def test_both_parts_of_complex_weights_are_counted(tmp_path: Path) -> None:
    weights = {"a": torch.tensor([complex(math.nan, 1.0)] * 4), "n": torch.arange(3)}
    torch.save(weights, tmp_path / "x.pt")
    found = gather(tmp_path / "x.pt").facts.weights
    assert found is not None
    assert (found.total.elements, found.total.nan) == (8, 4)
    assert found.not_examined == {"n": "int64"}
