"""Every type written to a run directory. Field names and units are a contract with readers."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

SCHEMA_VERSION = 1


class Record(BaseModel):
    """A frozen value that is written as strict JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self, indent: int | None = None) -> str:
        """Strict JSON text; NaN and infinities become `"nan"`, `"inf"`, `"-inf"`."""
        return strict_json(self.model_dump(mode="python"), indent=indent)


def json_number(value: float) -> float | str:
    """`value`, or its name where strict JSON has no number for it."""
    return value if math.isfinite(value) else str(value)


_encode = json.JSONEncoder(allow_nan=False).encode


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON text without NaN or Infinity literals (RFC 8259)."""
    encode = json.JSONEncoder(allow_nan=False, indent=indent).encode if indent else _encode
    try:
        return encode(value)
    except ValueError:
        return encode(_named(value))


def _named(value: Any) -> Any:
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    return value


class ModuleTypes(Record):
    """Types of one module, as observed: `fp32`, `fp16`, `bf16`, several joined by `+`, or `-`.

    `inputs` and `outputs` are what its forward got and gave, `operands` what its own products
    (convolutions, matrix products) multiplied.
    """

    stored: str
    computed: str
    gradient: str
    inputs: str = "-"
    outputs: str = "-"
    operands: str = "-"


class ModulePrecision(Record):
    """Types of one module, as planned; `-` where it has no parameters, no masters, no operations.

    `computed` is of the module's own operations, `gradient` that of its parameters' `.grad` after
    backward, `master` that of the weights which the optimizer steps. The model's own operations
    stand under the name `""`, those of the loss under `loss`.
    """

    name: str
    type: str
    parameters: int
    stored: str
    computed: str
    gradient: str
    master: str
    why: str


class PlanWarning(Record):
    """Possible but unsafe: what `diagnose` would find later."""

    finding: str | None
    path: str
    message: str
    hint: str | None


class MemoryPlan(Record):
    """Bytes that one rank needs in its device's memory while it trains, beside its program.

    The parts are what lies there all the time; `peak` is what is there at once at most.
    """

    weights: int = Field(ge=0, description="as the forward uses them")
    masters: int = Field(ge=0, description="fp32 copies of half weights")
    gradients: int = Field(ge=0)
    optimizer: int = Field(ge=0, description="the optimizer's state")
    average: int = Field(ge=0, description="of the weights, with `train.ema`")
    buffers: int = Field(ge=0, description="such as running statistics, and their copies")
    batch: int = Field(default=0, ge=0, description="the samples of a step")
    activations: int = Field(ge=0, description="most that backward waits for, of a micro-batch")
    temporary: int = Field(ge=0, description="at the peak, beside those parts that are there")
    peak: int = Field(ge=0)
    peak_at: Literal["forward", "backward", "update"]
    host: int = Field(default=0, ge=0, description="offloaded to the machine's memory instead")


class Plan(Record):
    """Everything derived from (Recipe, Machine) before a tensor is made."""

    version: int = SCHEMA_VERSION
    device: str
    world_size: int
    num_train: int
    num_eval: int
    data_source: str
    sample: dict[str, str] = Field(description="name -> type and shape of a sample's tensors")
    steps: int = Field(ge=1)
    steps_per_epoch: int
    micro_batch_size: int = Field(ge=1)
    accumulation: int = Field(ge=1, description="micro-batches per optimizer step")
    host_reads: int = Field(
        default=0,
        ge=0,
        description="times that the host waits for the device in each step, at most",
    )
    parameters: int
    modules: tuple[ModulePrecision, ...]
    fp32_modules: tuple[str, ...] = Field(
        default=(), description="modules that store and compute fp32 among half neighbours"
    )
    model_sha256: str | None = Field(
        default=None, description="of the config and the tokenizer that a model of text has"
    )
    memory: MemoryPlan | None = Field(
        default=None, description="of the rank that needs most; null: not known, or no training"
    )
    memory_unknown: str | None = Field(default=None, description="why its memory is not known")
    warnings: tuple[PlanWarning, ...] = ()


class PluginRecord(Record):
    """The plug-in that a run was made with: no other may go on with it."""

    file: str = Field(description="its name, without folders")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TrackerState(Record):
    """`trackers/<name>/run.json`: how far a tracker has got; the next attempt goes on from there.

    The steps are those of the newest rows of `steps.jsonl` and `evals.jsonl` that it has.
    """

    run: str | None = Field(default=None, description="what names the run there")
    step: int = 0
    evaluated: int = 0


class TrainedOn(Record):
    """What a model took from its training data: `data` of `final/model.json`.

    `mean` and `std` of the images' channels; `classes` by the numbers of their labels, where they
    have names.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    num_classes: int | None = None
    classes: tuple[str, ...] = ()


class StepRecord(Record):
    """One row of `steps.jsonl`: one attempted optimizer step."""

    step: int
    attempt: int
    loss: float
    lr: float
    grad_norm: float
    scale: float
    applied: bool
    samples_per_second: float
    memory_allocated_bytes: int
    memory_peak_bytes: int

    def to_json(self, indent: int | None = None) -> str:
        """Strict JSON text; flat, so that nothing has to be converted first: it is often called."""
        return strict_json(vars(self), indent)


class ShadowComparison(Record):
    """A tensor beside the same one computed in fp32 (its shadow), element for element.

    Only a shadow proves what a number format lost: of a value that is zero, the value itself does
    not say whether it should be.
    """

    flushed: float = Field(description="share that is zero here, and not in the shadow")
    overflowed: float = Field(description="share that is not finite here, but is in the shadow")
    error: float = Field(description="L2 norm of the difference over that of the shadow")
    cosine: float | None = Field(
        default=None, description="of the angle to the shadow; null where either is zero"
    )
    rms: float | None = Field(
        default=None, description="root mean square of the shadow, without the loss scale"
    )
    zeros: float | None = Field(default=None, description="share that is zero in the shadow")


class LayerRecord(Record):
    """One row of `layers.jsonl`: one tensor of a sampled step.

    Shares are of the sampled elements, of which there are at most 16,384 (all, if there are no
    more); `max`, `nan` and `inf` are exact. Values are those that the tensor holds: those of a
    gradient are multiplied by `scale`.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    step: int
    attempt: int
    rank: int = 0
    module: str = Field(description="its name in the model, or `loss`")
    tensor: Literal["output", "grad_output", "weight", "grad", "update"]
    name: str = Field(description="of the parameter, or of the module that has the output")
    call: int = Field(default=0, description="of the module within the step, from 0")
    dtype: str
    scale: float = Field(description="loss scale that the values are multiplied by; 1 for others")
    elements: int
    sampled: int
    max: float = Field(description="largest magnitude of what is not NaN")
    rms: float = Field(description="root mean square of the finite ones")
    zeros: float
    nan: int
    inf: int
    at_least_65520: float = Field(description="share of |x| >= 65520, which fp16 rounds to inf")
    subnormal: float = Field(description="share of non-zero |x| below the type's least normal one")
    would_flush: float | None = Field(
        description="share of non-zero |x| <= 2^-25, which fp16 rounds to 0; null for what went "
        "through fp16 before, where they are gone"
    )
    lowest_exponent: int | None = Field(description="of the first of `exponents`")
    exponents: tuple[int, ...] = Field(
        description="how many |x| lie in [2^e, 2^(e+1)), for e from the lowest to the highest"
    )
    lowest_unscaled_exponent: float | None = Field(
        description="`lowest_exponent` - log2(`scale`): of the gradient itself"
    )
    update_ratio: float | None = Field(
        default=None, description="of an update: its RMS over that of the weight"
    )
    lost: float | None = Field(
        default=None,
        description="of an applied update: share of the elements with a non-zero gradient whose "
        "stored weight did not change",
    )
    shadow: ShadowComparison | None = None

    def to_json(self, indent: int | None = None) -> str:
        """Strict JSON text, by pydantic where it can: a sampled step has hundreds of these."""
        text = self.model_dump_json(indent=indent)
        named = "NaN" in text or "Infinity" in text  # which strict JSON has not
        return super().to_json(indent) if named else text


class NonFiniteOrigin(Record):
    """Where the first NaN or infinity of a step was made out of finite numbers."""

    module: str = Field(description="its name in the model; `loss` outside its forward")
    phase: Literal["forward", "backward", "input"]
    value: Literal["nan", "inf"]
    call: int = Field(default=0, description="of the module within the step, from 0")
    operation: str | None = Field(
        default=None, description="`weights`: the module's own were not finite before the step"
    )
    elements: int | None = Field(default=None, description="of the tensor that held it first")


class FlightRecord(Record):
    """`flight.json`: a step that was skipped, or whose loss was not finite."""

    version: int = SCHEMA_VERSION
    step: int
    attempt: int
    rank: int = 0
    loss: float
    grad_norm: float
    scale: float
    applied: bool
    batch: str = Field(default="stored", description="or why it is not")
    weights: tuple[int, ...] | None = Field(
        default=None, description="how many things the loss sums over each sample"
    )
    largest: dict[str, float] = Field(
        default={}, description="finite magnitude in each floating-point tensor of the batch"
    )
    origin: NonFiniteOrigin | None = Field(
        default=None, description="found on the spot, in a loop that cannot be repeated"
    )
    no_origin: str | None = Field(
        default=None, description="why it was looked for on the spot and not found"
    )

    @classmethod
    def of(cls, row: StepRecord, **about: Any) -> FlightRecord:
        """Of a step with this row; `about` has the fields that a row has not."""
        shared = ("step", "attempt", "loss", "grad_norm", "scale", "applied")
        return cls(**{name: getattr(row, name) for name in shared}, **about)


class ForeignModule(Record):
    """A module of a model that is not ours; `stored` are the types of its own parameters."""

    name: str
    type: str
    parameters: int
    stored: str


class ForeignRun(Record):
    """`foreign.json`: what is recorded of a training that is not ours."""

    version: int = SCHEMA_VERSION
    loop: str = Field(description="`pytorch`, or `transformers` for a Hugging Face Trainer")
    model: str = Field(description="its class")
    parameters: int
    optimizer: str
    scaler: str | None
    every: int = Field(description="steps from one sampled step to the next")
    device: str = "cpu"
    settings: dict[str, float | bool | str | None] = Field(
        default={}, description="of the optimizer's first group, the scaler and the Trainer"
    )
    modules: tuple[ForeignModule, ...] = Field(
        default=(), description="those with parameters of their own"
    )
    masters: bool = Field(
        default=False, description="whether the optimizer steps copies of the model's weights"
    )
    compiled: bool = Field(
        default=False, description="whether the model is compiled: its modules cannot be watched"
    )


class LoopEvent(Record):
    """What happened in a step of somebody's loop, as it happened; fields that apply are there.

    `stale_gradients`: at the first backward there were gradients of an earlier step.
    `gradients_changed`: something that is not recorded wrote to them (by hand, for example).
    `skipped_step`: the scaler left the optimizer's step out. `state_changed`: though the step was
    left out, a tensor of the optimizer's state is not what it was. `buffer_nonfinite`: a buffer of
    the model held NaN or infinity after the step.
    """

    event: Literal[
        "zero_grad",
        "stale_gradients",
        "forward",
        "scale",
        "backward",
        "gradients_changed",
        "unscale",
        "clip_norm",
        "clip_value",
        "optimizer_step",
        "skipped_step",
        "state_changed",
        "scaler_update",
        "buffer_nonfinite",
    ]
    gradients: Literal["none", "scaled", "unscaled", "mixed"] | None = Field(
        default=None, description="as the event found them; those that a backward left"
    )
    by: str | None = Field(default=None, description="who did it, where it is not the loop")
    name: str | None = None
    autocast: str | None = Field(
        default=None, description="type that autocast computes in inside a forward, or `off`"
    )
    output: str | None = Field(default=None, description="types of what a forward returned")
    loss: float | None = Field(default=None, description="of a backward, not scaled")
    scale: float | None = None
    norm: float | None = Field(
        default=None, description="of the gradients, as the event found them"
    )
    limit: float | None = Field(default=None, description="that gradients were clipped to")


class LoopRecord(Record):
    """One row of `events.jsonl`: a step in which other things happened than in the one before."""

    step: int
    attempt: int
    rank: int = 0
    events: tuple[LoopEvent, ...]
    left_out: int = Field(default=0, description="events after those")

    def to_json(self, indent: int | None = None) -> str:
        """Strict JSON text, without the fields that do not apply."""
        return strict_json(self.model_dump(exclude_none=True), indent)


class ReplayedModule(Record):
    """One call of a module in a step that was run again, beside the same call in fp32.

    Gradients are of the module's outputs, and of its own parameters together, without the loss
    scale. Of each tensor at most 262,144 elements are compared.
    """

    module: str = Field(description="its name in the model; empty: the model itself")
    call: int
    type: str = Field(description="its class")
    output: ShadowComparison | None = Field(description="in the run's precision")
    output_max: float | None = Field(description="largest magnitude of what is not NaN")
    exact_output_max: float | None = Field(default=None, description="of the output in fp32")
    grad_output: ShadowComparison | None
    grad_output_max: float | None
    exact_grad_max: float | None = Field(
        default=None, description="in fp32, of the outputs' gradients and its own parameters'"
    )
    parameter_grad: ShadowComparison | None
    fp32_parameter_grad_rms: float | None = Field(
        default=None, description="root mean square of the gradient of its own parameters in fp32"
    )
    bf16_output: ShadowComparison | None = Field(
        description="in bf16 (autocast); null where torch cannot compute it"
    )
    bf16_grad_output: ShadowComparison | None
    half_operations: tuple[str, ...] = Field(
        default=(),
        description="norms, softmaxes, sums, means, roots and exponentials that it computed itself "
        "with a result in fp16 or bf16, by torch's names",
    )


class ReplayedAttention(Record):
    """The logits of attention in a call of a module, in fp32."""

    module: str = Field(description="that multiplied the queries with the keys")
    call: int
    product_max: float = Field(description="largest |q . k|, as it was multiplied")
    logit_max: float = Field(description="of what the softmax was given, without masked places")
    entropy: float = Field(description="mean over the queries, over that of equal probabilities")
    saturated: float = Field(
        description="share of the queries with a probability of 1 in fp32: no gradient gets past"
    )


class ReplayedInput(Record):
    """A tensor of the batch that was run again."""

    name: str
    nan: int
    inf: int
    max: float = Field(description="largest finite magnitude")
    usual_max: float | None = Field(description="the same of a neighbouring step's batch")


class Parting(Record):
    """The first module whose result is far from that in fp32 while what it was given is not."""

    module: str = Field(description="its name in the model; `loss` outside its forward")
    call: int
    phase: Literal["forward", "backward"]
    error: float = Field(description="L2 norm of the difference over that in fp32")


class Replay(Record):
    """A step of a run that was run again, and its shadows."""

    version: int = SCHEMA_VERSION
    step: int
    attempt: int
    rank: int = 0
    why: str = Field(description="that this step was chosen")
    checkpoint: int | None = Field(description="step of the state that was gone on from, or null")
    steps_again: int = Field(description="run before it, without a shadow")
    mode: str
    scale: float
    loss: float
    recorded_loss: float | None = Field(description="of `steps.jsonl`")
    reproduced: bool | None = Field(
        description="both losses are the same fp32 number; null without a recorded one, and where "
        "the run was compiled (it is followed as it was before that) or several ranks trained "
        "(their losses are added in another order)"
    )
    finite: bool = Field(description="all gradients of the step, in the run's precision")
    micro_batch: int = Field(description="the one that was compared, from 0")
    micro_batches: int
    origin: NonFiniteOrigin | None
    shadow_losses: dict[str, float] = Field(description="of that micro-batch, and `run`'s own")
    shadow_origins: dict[str, NonFiniteOrigin | None]
    running_statistics_loss: float | None = Field(
        default=None,
        description="as `shadow_losses`' fp32, with the running statistics of BatchNorm in place "
        "of the batch's; null without any",
    )
    parting: Parting | None
    nondeterministic: tuple[str, ...] = Field(
        description="modules that gave other bits when the step was run twice with deterministic "
        "kernels"
    )
    same_random_numbers: bool = Field(description="the shadows had those of the run")
    modules: tuple[ReplayedModule, ...] = Field(description="in the order of returning")
    attention: tuple[ReplayedAttention, ...] = ()
    inputs: tuple[ReplayedInput, ...] = Field(
        default=(), description="the floating-point tensors of the whole step's batch"
    )
    flight_differs: tuple[str, ...] | None = Field(
        default=None,
        description="which of `batch` and `random state` were taken from the step's flight, being "
        "others than those of the data set and of the steps before it; null without a flight",
    )


class EvalRecord(Record):
    """One row of `evals.jsonl`: beside these fields, the metrics that the task has."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    step: int
    attempt: int
    loss: float
    ema: bool
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """The loss first."""
        return {"loss": self.loss, **self.__pydantic_extra__}


class RollbackRecord(Record):
    """One row of `rollbacks.jsonl`: after `step` the state became that of `checkpoint`."""

    step: int
    attempt: int
    checkpoint: int = Field(description="attempted steps of the state that was gone back to")
    reason: str


class TrainingState(Record):
    """What a checkpoint's `state.json` says beside the engine's part: the run so far.

    `steps` is the planned length, from which the learning rates followed; `evaluated` the step
    after which `evaluation` was made, `best` step and value of the best
    one (`output.keep_best`), `scheduled` the newest checkpoint that no signal asked for.
    """

    steps: int = Field(ge=1)
    attempted: int = Field(ge=0)
    applied: int = Field(ge=0)
    consecutive_skips: int = Field(ge=0)
    skips_at_floor: int = Field(ge=0)
    peak_memory_bytes: int = Field(ge=0)
    seconds: float = Field(ge=0)
    recent_losses: tuple[float, ...]
    evaluation: dict[str, float]
    evaluated: int = Field(ge=0)
    best: tuple[int, float] | None = None
    scheduled: int | None = None
    rollbacks: int = Field(default=0, ge=0)
    engine: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> TrainingState:
        last = self.attempted
        if max(self.applied, self.consecutive_skips, self.skips_at_floor, self.evaluated) > last:
            raise ValueError(f"it counts more than the {last} attempted steps")
        if self.evaluated and "loss" not in self.evaluation:
            raise ValueError("an evaluation without a loss")
        return self


Status = Literal["done", "diverged", "preempted", "interrupted", "failed"]


class ResultProblem(TypedDict):
    """Why a run ended so, or what is to be known of it: as the command line's JSON says it."""

    file: str | None
    line: int | None
    column: int | None
    path: str | None
    message: str
    hint: str | None
    severity: Literal["error", "warning"]
    finding: str | None


class Heartbeat(Record):
    """`attempts/<k>/rank<N>.json`: where one of several processes is."""

    version: int = SCHEMA_VERSION
    rank: int
    pid: int
    launcher: int = Field(description="process that started it")
    host: str
    step: int = Field(description="attempted step that it began last; 0: it is not yet training")
    state: Literal["running", "ended"] = "running"


class RankFailure(Record):
    """`attempts/<k>/failure.rank<N>.json`: how one of several processes ended by itself."""

    version: int = SCHEMA_VERSION
    rank: int
    step: int = Field(description="attempted step that it was in; 0: it was not yet training")
    status: Status = "failed"
    exit_code: int
    problems: tuple[ResultProblem, ...] = ()
    traceback: tuple[str, ...] = Field(default=(), description="innermost lines, of a bug")
    lost_peer: bool = Field(default=False, description="only another rank could not be reached")
    timed_out: bool = Field(default=False, description="it waited for another rank in vain")
    killed_by: str | None = Field(
        default=None, description="signal; its launcher says so, since the rank could not"
    )


class Result(Record):
    """`result.json`, and what `run --json` prints."""

    version: int = SCHEMA_VERSION
    status: Status
    exit_code: int
    reason: str | None = None
    name: str
    steps_attempted: int
    steps_applied: int
    steps_skipped: int
    metrics: dict[str, dict[str, float]]
    wall_seconds: float
    input_share: float = Field(
        default=0.0, description="of the last attempt's time, in which training waited for batches"
    )
    peak_memory_bytes: int
    checkpoint: str | None
    best_checkpoint: str | None = None
    problems: tuple[ResultProblem, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Result:
        if (self.status == "done") != (self.exit_code == 0):
            raise ValueError(f"exit code {self.exit_code} of a run that is {self.status}")
        return self
