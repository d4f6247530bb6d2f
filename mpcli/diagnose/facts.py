"""Types of what `mptrain diagnose --json` prints as `evidence`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mpcli.diagnose.statics import FORMATS, Statics
from mpcli.records import (
    FlightRecord,
    ForeignRun,
    LayerRecord,
    LoopRecord,
    ModuleTypes,
    Record,
    Result,
    StepRecord,
)


class RangeFacts(Record):
    """Values that a format cannot hold as they are: shares of the finite non-zero ones.

    Values that are stored in a format say nothing about what it lost of them: `above` and `below`
    are null where all are.
    """

    above: float | None = Field(description="round to infinity (e4m3: to more than its maximum)")
    below: float | None = Field(description="round to zero")
    subnormal: float = Field(description="round to a subnormal number")
    error: float | None = Field(
        description="L2 norm of what rounding changes, over that of the values; fp16 and bf16 only"
    )


class TensorFacts(Record):
    """Exact facts about the values of a tensor, of a layer, or of all."""

    name: str
    dtypes: dict[str, int] = Field(description="how many values are stored in each type")
    elements: int
    zeros: int
    nan: int
    inf: int
    max: float = Field(description="largest finite magnitude")
    rms: float = Field(description="root mean square of the finite values")
    headroom_bits: float | None = Field(
        description="log2 of fp16's overflow limit, 65520, over `max`; null for zeros"
    )
    formats: dict[str, RangeFacts]
    fits: dict[str, bool] | None = Field(
        default=None, description="of a layer with finite values: in fp16, in bf16"
    )


class WeightFacts(Record):
    """The static part: what weights are, and which format can hold them."""

    verdict: str
    dtype: Literal["fp16", "bf16", "fp32"] | None = Field(
        description="of all but `fp32_layers`; null without finite values"
    )
    fp32_layers: tuple[str, ...]
    nonfinite_layers: tuple[str, ...]
    total: TensorFacts
    layers: tuple[TensorFacts, ...]
    tensors: tuple[TensorFacts, ...]
    tied: dict[str, str] = Field(description="tensor -> the one whose memory it has")
    not_examined: dict[str, str] = Field(description="tensor -> type, which is no float")


class StateFacts(Record):
    """All tensors of one name in an optimizer's state."""

    key: str
    tensors: int
    elements: int
    nan: int
    inf: int
    max: float
    zero: tuple[str, ...] = Field(description="parameters whose tensor is nothing but zeros")
    nonfinite: tuple[str, ...] = Field(description="parameters whose tensor has NaN or infinity")


class OptimizerFacts(Record):
    """An optimizer's state."""

    states: tuple[StateFacts, ...]


class ScalerFacts(Record):
    """State of a loss scale."""

    scale: float
    growth_tracker: int = Field(description="good steps since the scale last changed")
    growth_interval: int | None


class LoggedRow(Record):
    """One entry of `log_history` in a Hugging Face Trainer's `trainer_state.json`."""

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float | None


class TrainerFacts(Record):
    """What a Hugging Face Trainer says of its training."""

    global_step: int
    max_steps: int | None
    epoch: float | None
    last: tuple[LoggedRow, ...]
    first_nonfinite: LoggedRow | None = Field(description="of loss or gradient norm")


class RunFacts(Record):
    """What a run directory says of its training."""

    foreign: ForeignRun | None
    result: Result | None
    steps: int
    skipped: int
    nonfinite_losses: int
    first_nonfinite: StepRecord | None = Field(description="of its losses")
    last: tuple[StepRecord, ...]
    sampled: tuple[LayerRecord, ...] = Field(description="the newest sampled step")
    flights: tuple[FlightRecord, ...]
    events: tuple[LoopRecord, ...] = Field(description="of a loop that is not ours")
    types: dict[str, ModuleTypes] = Field(description="in the first step of the newest attempt")
    unread: dict[str, int] = Field(description="file -> how many of its rows cannot be read")


class NotRead(Record):
    """A file that was left alone."""

    file: str
    why: str


class Facts(Record):
    """Everything that was found in one place."""

    path: str
    kind: Literal["run", "checkpoint", "folder", "file"]
    run: RunFacts | None = None
    trainer: TrainerFacts | None = None
    weights_from: str | None = None
    weights: WeightFacts | None = None
    optimizer: OptimizerFacts | None = None
    scaler: ScalerFacts | None = None
    not_read: tuple[NotRead, ...] = ()
    finite_checkpoint: str | None = Field(
        default=None,
        description="of a run: the newest one with finite weights, where those that were read hold "
        "NaN or infinity",
    )


def tensor_facts(name: str, statics: Statics) -> TensorFacts:
    """Statics as they are printed."""
    formats = {}
    for form, outside in statics.outside.items():
        lost = statics.dtypes.get(_STORED.get(form, form)) == statics.elements
        formats[form] = RangeFacts(
            above=None if lost else statics.share(outside.above),
            below=None if lost else statics.share(outside.below),
            subnormal=statics.share(outside.subnormal),
            error=statics.error(form) if FORMATS[form].dtype.itemsize == 2 else None,
        )
    return TensorFacts(
        name=name, dtypes=statics.dtypes, elements=statics.elements, zeros=statics.zeros,
        nan=statics.nan, inf=statics.inf, max=statics.max, rms=statics.rms,
        headroom_bits=statics.headroom, formats=formats,
    )  # fmt: skip


_STORED = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
