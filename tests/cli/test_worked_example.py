"""The README's recipe that fails in fp16, on the real CIFAR-10: diagnosed, repaired, trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpcli.recipe.errors import Exit
from tests.cli.test_readme import blocks

(RECIPE,) = (text for text in blocks("yaml") if "name: cifar10-static" in text)


@pytest.mark.slow
def test_the_recipe_that_fails_is_repaired(tmp_path, shared_data: Path, mptrain_process):
    (tmp_path / "cifar10-static.yaml").write_text(RECIPE)
    data = {"MPTRAIN_DATA": str(shared_data)}
    failed = mptrain_process("mptrain run cifar10-static.yaml --output broken", **data)
    assert failed.code == Exit.NUMERICS
    assert failed.err.splitlines()[-1] == "find out why: mptrain diagnose broken"

    said = mptrain_process(
        "mptrain diagnose broken --replay --verify --fix fixed.yaml --json", **data
    )
    assert said.code == 0
    (cause,) = said.json["findings"]
    assert (cause["id"], cause["phase"], cause["step"]) == ("scale-too-high", "backward", 1)
    assert cause["layers"] == ["loss"]
    assert cause["suggestion"]["set"] == ["precision.loss_scale={kind: dynamic}"]
    assert cause["verified"] is True
    tried = cause["tried"][0]
    assert tried["without"]["skipped"] == tried["without"]["steps"]
    assert tried["with_it"]["loss"] < tried["without"]["loss"]

    before, after = RECIPE.splitlines(), (tmp_path / "fixed.yaml").read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [(
        "  loss_scale: {kind: static, scale: 16777216}   # the higher, the safer?",
        "  loss_scale: {kind: dynamic}   # the higher, the safer?",
    )]  # fmt: skip
    mended = mptrain_process("mptrain run fixed.yaml --output mended --json", **data)
    assert mended.code == 0
    result = json.loads((tmp_path / "mended" / "result.json").read_text())
    assert result["steps_skipped"] < 10
    assert result["metrics"]["eval"]["accuracy"] > 0.15  # of ten classes; it had not learnt at all

    shown = "\n".join(blocks("console"))
    printed = mptrain_process("mptrain diagnose broken --replay", **data).out
    for line in printed.splitlines()[:1]:
        assert line in shown
    for setting in re.findall(r"--set .*", printed):
        assert setting in shown
