"""Signals to real processes."""

from __future__ import annotations

import signal

import pytest

from tests.processes import (
    BOTH,
    CASES,
    in_saving,
    in_the_start,
    in_the_whole_start,
    in_training,
    second_ctrl_c,
    to_the_whole_group,
)

CTRL_C = dict.fromkeys((second_ctrl_c, to_the_whole_group), signal.SIGINT)
ONE_EACH = {**dict(CASES), **dict.fromkeys((in_training, in_saving), signal.SIGTERM), **CTRL_C}
WHOLE_START = [(in_the_whole_start, number) for number in BOTH]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "number"), ONE_EACH.items())
def test_a_signal(case, number, recipe):
    case(recipe, number)


@pytest.mark.verify
@pytest.mark.parametrize("time", range(1, 6))
@pytest.mark.parametrize(
    ("case", "number"), [*(case for case in CASES if case[0] is not in_the_start), *WHOLE_START]
)
def test_a_signal_five_times_in_a_row(case, number, time, recipe):
    case(recipe, number)
