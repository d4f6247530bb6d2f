"""Half precision that does harm without a NaN, and that which does none."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcli.diagnose.checks.silent import SILENT
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.facts import Facts
from mpcli.diagnose.finding import Finding
from tests.diagnose.checks.numeric_runs import causes, evidence_of, odd_run


def said(folder: Path, layer: str, *overrides: str) -> list[Finding]:
    run, plugin = odd_run(folder, layer, "train.steps=5", *overrides)
    evidence = evidence_of(run, plugin)
    return [finding for check in SILENT for finding in check(evidence)]


def test_a_norm_that_loses_its_result_is_an_error(tmp_path: Path) -> None:
    (found,) = said(tmp_path, "norm")
    assert (found.id, found.layers, found.phase) == ("norm-in-half", ("2",), "forward")
    assert found.severity == "error"
    assert found.suggestion and found.suggestion.set == ('precision.sensitive_layers=["2"]',)


def test_a_norm_that_returns_zeros_is_no_underflow(tmp_path: Path) -> None:
    """Its squares are infinite in fp16, and its outputs are not."""
    run, plugin = odd_run(tmp_path, "large-norm", "train.steps=5")
    evidence = evidence_of(run, plugin)
    assert evidence.replay is not None and evidence.replay.origin is None
    (found,) = causes(evidence)
    assert (found.id, found.severity, found.layers) == ("norm-in-half", "error", ("2.1",))
    assert found.consequences == ()


def test_a_norm_that_does_no_harm_is_information(tmp_path: Path) -> None:
    (found,) = said(tmp_path, "small-norm")
    assert (found.id, found.severity) == ("norm-in-half", "info")
    assert found.suggestion
    assert found.suggestion.set == ("precision.sensitive_layers=[HandNorm]",)


@pytest.mark.parametrize("layer", ["torch-norm", "batch-norm", "sound-attention"])
def test_what_torch_computes_in_fp32_inside_is_not_told(tmp_path: Path, layer: str) -> None:
    assert said(tmp_path, layer, "precision.mode=fp16-pure") == []


@pytest.mark.parametrize("layer", ["sharp-attention", "fused-attention"])
@pytest.mark.parametrize("mode", ["fp16", "fp32"])
def test_attention_that_sees_one_key_is_told_in_any_precision(
    tmp_path: Path, layer: str, mode: str
) -> None:
    (found,) = said(tmp_path, layer, f"precision.mode={mode}")
    assert (found.id, found.layers, found.severity) == ("attention-logits", ("2",), "warning")
    assert found.evidence["share of queries without a gradient"] == 1
    entropy = found.evidence["entropy (1: all keys alike)"]
    assert isinstance(entropy, float) and entropy < 1e-6


def test_nothing_is_said_of_a_file() -> None:
    evidence = Evidence(Facts(path="x", kind="file"))
    assert [finding for check in SILENT for finding in check(evidence)] == []
