"""What is found on a machine, and what is said where torch does not work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mpcli import machine
from mpcli.cli.app import main
from mpcli.machine import check_installation, detect_machine, environment

SECRETS = {
    "HF_TOKEN": "hf_abcdef",
    "SLURM_JWT": "abcdef",
    "MPTRAIN_PASSWORD": "abcdef",
    "CUDA_API_KEY": "abcdef",
    "HF_ENDPOINT": "https://someone:abcdef@host/path?token=abcdef&page=2",
}


def test_this_machine_runs_fp32_natively_and_what_torch_offers():
    found = detect_machine()
    assert found.cpu_count >= 1
    assert len(found.cuda_devices) == torch.cuda.device_count()
    for kind in (found.emulated, found.unsupported):
        assert set(kind) == {"cpu", "cuda"}
        assert "fp32" not in kind["cpu"] | kind["cuda"]
        assert kind["cuda"] == frozenset() or found.cuda_devices


def test_precisions_are_found_by_trying():
    cpu = environment()["precisions"]["cpu"]
    assert set(cpu) == {"fp32", "bf16", "fp16"}
    assert cpu["fp32"] == {"runs": True, "native": True, "relative_time": 1.0, "error": None}
    assert all(p["relative_time"] > 0 for p in cpu.values() if p["runs"])


def test_a_precision_that_fails_is_not_called_native(monkeypatch):
    step = machine._small_step

    def without_bf16(device, precision, size):
        if precision == "bf16":
            raise RuntimeError("no kernel\nat line 3")
        return step(device, precision, size)

    monkeypatch.setattr(machine, "_small_step", without_bf16)
    assert detect_machine().unsupported["cpu"] == {"bf16"}
    assert environment()["precisions"]["cpu"]["bf16"] == {
        "runs": False, "native": False, "relative_time": None, "error": "no kernel",
    }  # fmt: skip


def test_trying_leaves_torchs_settings_as_they_were():
    before = torch.get_float32_matmul_precision(), torch.get_rng_state()
    environment()
    assert torch.get_float32_matmul_precision() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_variables_are_the_relevant_ones_without_their_secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("UNRELATED", "value")
    variables = environment()["variables"]
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["HF_ENDPOINT"] == "https://***@host/path?token=***&page=2"
    assert set(SECRETS) <= set(variables)
    assert "UNRELATED" not in variables
    assert "abcdef" not in json.dumps(variables)


def test_env_shows_the_same_as_text_and_as_json(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] in text
    assert re.search(r"cpu +fp32 +native +1\.0", text)
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
