"""What `ranked` keeps of any findings, whatever they say."""

from __future__ import annotations

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from mpcli.diagnose.finding import Finding, FindingId, Severity
from mpcli.diagnose.ranking import EXPLAINS, ranked

LEVELS = ("error", "warning", "info")


def finding(
    name: FindingId, severity: Severity, step: int | None, confidence: float, cause: str = "x"
) -> Finding:
    return Finding(
        id=name, severity=severity, cause=cause, phase="update", step=step, confidence=confidence,
        evidence={},
    )  # fmt: skip


FINDINGS = st.lists(
    st.tuples(
        st.sampled_from(get_args(FindingId)),
        st.sampled_from(get_args(Severity)),
        st.none() | st.integers(1, 4),
        st.sampled_from([0.5, 0.9]),
    ),
    max_size=12,
).map(lambda rows: [finding(*row, str(number)) for number, row in enumerate(rows)])
"""Each with a sentence of its own."""


def when(found: Finding) -> int:
    """Without a step: before the first."""
    return found.step or 0


@given(FINDINGS)
def test_every_finding_is_told_once(found: list[Finding]) -> None:
    told = []
    for cause in ranked(found):
        told += [cause.model_copy(update={"consequences": ()}), *cause.consequences]
    assert sorted(told, key=lambda one: int(one.cause)) == found


@given(FINDINGS)
def test_a_consequence_is_explained_by_its_cause_and_not_earlier(found: list[Finding]) -> None:
    for cause in ranked(found):
        for follows in cause.consequences:
            assert follows.id in EXPLAINS[cause.id]
            assert when(follows) >= when(cause)


@given(FINDINGS)
def test_errors_come_before_warnings_and_those_before_information(found: list[Finding]) -> None:
    levels = [LEVELS.index(cause.severity) for cause in ranked(found)]
    assert levels == sorted(levels)


@given(FINDINGS.flatmap(lambda found: st.tuples(st.just(found), st.permutations(found))))
def test_the_order_of_the_checks_is_of_no_matter(both: tuple[list[Finding], list[Finding]]) -> None:
    found, shuffled = both
    assert ranked(found) == ranked(shuffled)


def test_information_explains_no_fault() -> None:
    said = finding("adam-eps", "info", 1, 0.9)
    broken = finding("skip-storm", "error", 2, 0.9)
    assert [one.id for one in ranked([said, broken])] == ["skip-storm", "adam-eps"]
