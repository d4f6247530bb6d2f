"""What is found on a machine, and what is said where torch does not work."""

from __future__ import annotations

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mpcli import machine
from mpcli.cli.app import main
from mpcli.machine import check_installation, detect_machine, environment
from mpcli.signals import uninterrupted

SHOWN = {
    "OMP_NUM_THREADS": ("1", "1"),
    "HF_TOKEN": ("hf_abcdef", "***"),
    "HF_ENDPOINT": ("http://user:ab cdef@h/path?page=2&sig=abcdef", "http://***@h/path?***"),
    "MPTRAIN_DATA": ("/data?a&token=abcdef", "/data?***"),
    "TORCH_LOGS": ("key=abcdef x", "key=*** x"),
}
HIDDEN = {
    "MPTRAIN_PAT": "ghp_abcdef",
    "TORCH_X": "Bearer abcdef",
    "CUDA_FOO": "--password abcdef",
    "SLURM_JWT": "abcdef",
    "UNRELATED": "abcdef",
}


TF32_NEEDS = "TF32 needs an NVIDIA GPU of compute capability 8.0 or more"
half_types = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def test_this_machine_runs_fp32_natively_and_what_torch_offers():
    found = detect_machine()
    assert len(found.cuda_devices) == torch.cuda.device_count()
    for kind in (found.emulated, found.unsupported, found.broken_lstm):
        assert set(kind) == {"cpu", "cuda"}
        assert "fp32" not in kind["cpu"] | kind["cuda"]
        assert kind["cuda"] == frozenset() or found.cuda_devices
    assert "tf32" in found.unsupported["cpu"]
    assert not found.emulated["cpu"] & found.unsupported["cpu"]


def test_precisions_are_found_by_trying():
    cpu = environment()["precisions"]["cpu"]
    assert set(cpu) == {"fp32", "tf32", "bf16", "fp16"}
    assert cpu["fp32"] == {"runs": True, "native": True, "relative_time": 1.0, "error": None}
    assert cpu["tf32"] == {
        "runs": False, "native": False, "relative_time": None, "error": TF32_NEEDS,
    }  # fmt: skip
    assert all(p["relative_time"] > 0 for p in cpu.values() if p["runs"])


def test_a_precision_that_fails_is_neither_native_nor_emulated(monkeypatch):
    step = machine._small_step

    def without_bf16(device, precision, size):
        if precision == "bf16":
            raise RuntimeError("no kernel\nat line 3")
        return step(device, precision, size)

    monkeypatch.setattr(machine, "_small_step", without_bf16)
    found = detect_machine()
    assert found.unsupported["cpu"] == {"tf32", "bf16"}
    assert "bf16" not in found.emulated["cpu"] | found.broken_lstm["cpu"]
    assert environment()["precisions"]["cpu"]["bf16"] == {
        "runs": False, "native": False, "relative_time": None, "error": "no kernel",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "emulated", "unsupported"),
    [((7, 5), {"bf16"}, {"tf32"}), ((8, 0), set(), set())],  # a T4, an A100
)
def test_a_gpu_without_tensor_cores_for_it_emulates_bf16_and_lacks_tf32(
    monkeypatch, capability, emulated, unsupported
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * 2**30, 8 * 2**30))
    monkeypatch.setattr(machine, "_small_step", lambda device, precision, size: None)
    monkeypatch.setattr(machine, "_lstm_fails", lambda device, precision: False)
    found = detect_machine()
    assert found.emulated["cuda"] == emulated
    assert found.available_memory["cuda"] == 5 * 2**30
    assert found.unsupported["cuda"] == unsupported


def test_a_half_type_in_which_lstm_fails_is_found_by_trying(monkeypatch):
    forward = torch.nn.LSTM.forward

    def without_fp16(self, inputs):
        if torch.get_autocast_dtype("cpu") == torch.float16:
            raise RuntimeError("could not create a primitive descriptor")
        with torch.amp.autocast("cpu", enabled=False):
            return forward(self, inputs)

    monkeypatch.setattr(torch.nn.LSTM, "forward", without_fp16)
    assert detect_machine().broken_lstm["cpu"] == {"fp16"}


@half_types
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layer", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers_run_in_half_without_autocast(layer, train, half):
    """oneDNN is chosen by the input's type then: only where the processor has it."""
    module = layer(6, 6, num_layers=2, bidirectional=True).to(half).train(train)
    inputs = torch.ones(3, 2, 6, dtype=half, requires_grad=True)
    outputs, _ = module(inputs)
    outputs.sum().backward()
    assert outputs.dtype == inputs.grad.dtype == half
    assert {p.grad.dtype for p in module.parameters()} == {half}


@half_types
@pytest.mark.parametrize("layer", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers_run_as_fp32_islands(layer, half):
    module = layer(6, 6, num_layers=2, bidirectional=True)
    inputs = torch.ones(3, 2, 6, dtype=half, requires_grad=True)
    with torch.amp.autocast("cpu", half), torch.amp.autocast("cpu", enabled=False):
        outputs, _ = module(inputs.float())
    outputs.to(half).sum().backward()
    assert inputs.grad.dtype == half
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


def test_trying_leaves_torchs_settings_as_they_were():
    before = torch.get_float32_matmul_precision(), torch.get_rng_state()
    environment()
    detect_machine()
    assert torch.get_float32_matmul_precision() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_variables_are_the_relevant_ones_without_their_secrets(monkeypatch):
    for name, (value, _) in SHOWN.items():
        monkeypatch.setenv(name, value)
    for name, value in HIDDEN.items():
        monkeypatch.setenv(name, value)
    variables = environment()["variables"]
    assert {name: variables.get(name) for name in SHOWN} == {n: v for n, (_, v) in SHOWN.items()}
    assert not set(HIDDEN) & set(variables)


@pytest.mark.parametrize("in_block", [True, False])
def test_ctrl_c_waits_for_the_end_of_imports(in_block):
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        if in_block:
            signal.raise_signal(signal.SIGINT)  # a second one is not waited for
            reached.append(2)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_that_handles_ctrl_c_itself_goes_on_to(monkeypatch):
    handled = []
    before = signal.signal(signal.SIGINT, lambda *_: handled.append(1))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert handled == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_imports_of_another_thread_are_none_of_its_business():
    with ThreadPoolExecutor() as pool:
        pool.submit(check_installation).result()


def test_env_shows_the_same_as_text_and_as_json(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] in text
    assert re.search(r"cpu +fp32 +native +1\.0", text)
    assert re.search(rf"cpu +tf32 .*{TF32_NEEDS}", text)
    assert "hf_abcdef" not in text


def _fake(folder: Path, package: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import package` run `code`."""
    (folder / f"{package}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(machine.sys.modules, package, raising=False)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "nms does not exist"),
        ("raise OSError('libcudart.so.13: cannot open')", "libcudart.so.13: cannot open"),
        ("raise ImportError('undefined symbol: x')", "undefined symbol: x"),
    ],
)
def test_a_torchvision_of_another_build_is_told_with_the_remedy(
    tmp_path, monkeypatch, capsys, code, message
):
    _fake(tmp_path, "torchvision", code, monkeypatch)
    assert main(["env", "--json"]) == 3
    captured = capsys.readouterr()
    (problem,) = json.loads(captured.out)["problems"]
    assert message in problem["message"]
    assert f"torch {machine._version('torch')}" in problem["message"]
    assert machine.KNOWN_PAIR in problem["hint"]
    assert "Traceback" not in captured.err


def test_a_missing_package_is_told_with_what_to_install(tmp_path, monkeypatch):
    code = "raise ModuleNotFoundError('No module named', name='torchvision')"
    _fake(tmp_path, "torchvision", code, monkeypatch)
    with pytest.raises(machine.UserError) as caught:
        check_installation()
    (problem,) = caught.value.problems
    assert (problem.what, problem.exit_code) == ("torchvision is not installed", 3)
    assert problem.hint == machine.KNOWN_PAIR


def test_a_backend_that_breaks_torch_is_told_with_the_variable(tmp_path, monkeypatch):
    code = "raise RuntimeError('Failed to load x; set TORCH_DEVICE_BACKEND_AUTOLOAD=0')"
    _fake(tmp_path, "torchvision", code, monkeypatch)
    with pytest.raises(machine.UserError, match="Failed to load x") as caught:
        check_installation()
    assert caught.value.problems[0].hint.startswith("set TORCH_DEVICE_BACKEND_AUTOLOAD=0")


def test_the_recommended_pair_is_the_pinned_one():
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    assert set(re.findall(r'"(.*?)"', machine.KNOWN_PAIR)) <= set(pins)
