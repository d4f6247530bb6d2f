"""What is written of a sweep: of each trial, and of all of them together."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mpcli.records import SCHEMA_VERSION, Record, Status


class Fractions(Record):
    """Shares of the values that are not zero in fp32, multiplied by a loss scale, in fp16."""

    underflow: float = Field(description="become zero")
    subnormal: float = Field(description="stay, below 2^-14, with fewer bits")
    overflow: float = Field(description="become infinite")


class GradientHistogram(Record):
    """Exponents of one tensor's unscaled fp32 gradients, over the moments of a run.

    Attributes:
        module: whose output's or parameters' gradients these are.
        counts: of values x with floor(log2|x|) = lowest, lowest + 1, ...
    """

    module: str
    tensor: Literal["grad_output", "grad"]
    name: str
    elements: int
    max: float = Field(description="largest magnitude of all elements, at any moment")
    zeros: float = Field(description="share of the elements")
    lowest: int | None = Field(description="exponent of the first of `counts`; null: all are zero")
    counts: tuple[int, ...]


class LayerFractions(Record):
    """What became of one tensor's gradients in a real run in half precision."""

    module: str
    tensor: Literal["grad_output", "grad"]
    name: str
    elements: int
    fractions: Fractions


class GradientError(Record):
    """The gradient of all parameters beside its fp32 shadow."""

    cosine: float
    relative: float = Field(description="L2 norm of the difference over that in fp32")


class TrialResult(Record):
    """What a study keeps of one finished run: enough for every table, on any machine."""

    version: int = SCHEMA_VERSION
    label: str
    seed: int
    settings: tuple[str, ...]
    run: str = Field(description="its folder's name below `trials/`")
    status: Status
    reason: str | None = None
    steps: int = Field(description="attempted")
    skipped: int
    first_loss: float | None
    loss: float | None = Field(description="mean of the last tenth of its steps, at least 5")
    metrics: dict[str, float] = Field(description="of the last evaluation")
    seconds_per_step: float | None = Field(description="median")
    peak_memory_bytes: int
    histograms: tuple[GradientHistogram, ...] = Field(
        default=(), description="of the fp32 reference of a loss-scale sweep"
    )
    outputs_max: dict[str, float] = Field(
        default={}, description="module -> largest |output| in fp32, at any moment; as histograms"
    )
    layers: tuple[LayerFractions, ...] = Field(
        default=(), description="of a trial in half precision of a loss-scale sweep"
    )
    gradient_error: GradientError | None = None


class SweepResult(Record):
    """`result.json` of a sweep, and what `--json` prints.

    Attributes:
        kind: of the sweep.
        rows: as the kind's table has them.
        predicted: of a loss-scale sweep, from its fp32 reference: for every scale from 2^-8 to
            2^32 the shares of all values, and those of each tensor that fp16 holds.
    """

    version: int = SCHEMA_VERSION
    kind: Literal["loss-scale", "precision", "grid"]
    status: Status = Field(default="done", description="failed or diverged: every run did")
    exit_code: int = 0
    name: str = Field(description="of the recipe")
    study: str
    steps: int
    seeds: tuple[int, ...]
    recommended: dict[str, Any] | None = None
    rows: tuple[dict[str, Any], ...]
    predicted: tuple[dict[str, Any], ...] = ()
    trials: tuple[TrialResult, ...]
