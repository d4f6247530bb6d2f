"""What `mptrain diagnose` says: a cause, its numbers, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from mpcli.records import Record

FindingId = Literal[
    "underflow",
    "forward-overflow",
    "forward-nonfinite",
    "scale-too-high",
    "scale-collapse",
    "backward-nonfinite",
    "skip-storm",
    "exploding-gradients",
    "vanishing-gradients",
    "lost-updates",
    "adam-eps",
    "attention-logits",
    "norm-in-half",
    "batchnorm-stats",
    "half-reduction",
    "autocast-inactive",
    "fp32-island",
    "clip-before-unscale",
    "missing-unscale",
    "accumulation",
    "bad-checkpoint",
    "bad-batch",
    "nondeterminism",
    "out-of-memory",
    "learning-rate",
    "weights-exceed-fp16",
    "optimizer-state-corrupted",
]
Severity = Literal["info", "warning", "error"]
Phase = Literal["forward", "backward", "update", "input"]
Arguments = Mapping[str, bool | float | str]


class Suggestion(Record):
    """One change that should mend a cause.

    For a run of ours `set` is what to pass to `--set`, and can be tried by `--verify`. For the loop
    of somebody else `code` says what to write, and for a Hugging Face Trainer `arguments` what to
    give to `TrainingArguments`, where there is such an argument.
    """

    what: str = Field(description="in a few words, as an instruction")
    set: tuple[str, ...] = Field(default=(), description="`path=value` of the recipe")
    code: str | None = None
    arguments: Arguments = Field(default={}, description="of `TrainingArguments`")


class Arm(Record):
    """What some steps gave, in one of the two runs of a verification."""

    steps: int
    skipped: int = Field(description="steps with NaN or infinite gradients")
    loss: float = Field(description="mean of the last quarter of the steps")
    symptom: float = Field(description="what is measured, by `Verification.symptom`")
    seconds_per_step: float
    peak_memory_bytes: int


class Verification(Record):
    """A suggestion that was tried: the same steps without and with it."""

    suggestion: Suggestion
    fixed: bool
    why: str = Field(description="what makes it so, in a sentence with its numbers")
    symptom: str = Field(description="what `Arm.symptom` is")
    checkpoint: int | None = Field(description="step of the state gone on from; null: fresh")
    without: Arm
    with_it: Arm


class Finding(Record):
    """One cause, or something that follows from it."""

    id: FindingId
    severity: Severity
    cause: str = Field(description="in one sentence")
    layers: tuple[str, ...] = Field(default=(), description="modules, the worst first")
    phase: Phase
    step: int | None = Field(default=None, description="at which it is first seen")
    confidence: float = Field(ge=0, le=1, description="1: the numbers prove it")
    evidence: dict[str, float | str | bool | None]
    suggestion: Suggestion | None = None
    alternatives: tuple[Suggestion, ...] = Field(
        default=(), description="to try next, where the first does not help"
    )
    verified: bool | None = Field(
        default=None, description="whether `suggestion` was tried, and helped"
    )
    tried: tuple[Verification, ...] = ()
    consequences: tuple[Finding, ...] = Field(
        default=(), description="other findings that follow from this one"
    )
