"""What the trials of a loss-scale sweep say together: the scale to take, and why.

The thresholds are judgement; each says what it rests on.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mpcli.recipe.precision import DynamicScale
from mpcli.significance import standard_error
from mpcli.sweep.evidence import summed
from mpcli.sweep.prediction import LIMIT, SCALES, Prediction
from mpcli.sweep.results import Fractions, GradientHistogram, LayerFractions, TrialResult
from mpcli.sweep.text import number_text, power_text, share_text

LOST = 0.01
"""Share of the values that are not zero that may be lost at the knee. What is lost are the smallest
ones: 1% of the values is far less than 1% of a gradient's norm (measured: with 1.6% lost the whole
gradient was 0.6% off its fp32 shadow, which is what fp16's rounding does anyway)."""
HEADROOM = 2
"""Bits between the recommended scale and the top of the window: gradients of a batch that was not
sampled may be four times as large. More costs nothing while the scale stays above the knee, but
for small values that become subnormal."""
LEARNT = 0.05
"""Share of what fp32 learnt (of its first loss, where that is nothing) by which a run's final loss
may be above it: seeds of short runs differ by as much."""
NOISE = 0.25
"""The same where two standard errors of the mean paired difference are more than `LEARNT`: beyond,
runs differ so much from each other that something is wrong with some."""
RELIABLE = 1.0
"""Below this scale no prediction is relied on: most models lose most of their gradient there, and
what is lost in one layer is missing in those before it, which the prediction does not model."""
LAYERS_LOST = 0.05
"""Where more than this is lost of all values, the shares of single layers are not relied on: what
is lost in one layer is missing in those before it (docs/loss-scale.md has how much that is)."""
MAX_SCALE = DynamicScale(kind="dynamic").max_scale
"""The dynamic policy grows no further, unless it has to."""

_Tensor = tuple[str, str]


@dataclass(frozen=True)
class LossScaleSweep:
    """The trials of a sweep, of one or more seeds.

    Attributes:
        trials: with the labels `fp32`, `scale=V`, `dynamic`, `recommended`.
    """

    trials: Sequence[TrialResult]

    @cached_property
    def reference(self) -> list[TrialResult]:
        """In fp32."""
        return [trial for trial in self.trials if trial.label == "fp32"]

    @cached_property
    def exact(self) -> dict[int, float]:
        """Final losses in fp32, by seed, of the runs that ended with one."""
        return {t.seed: loss for t in self.reference if (loss := _final(t)) is not None}

    @cached_property
    def half(self) -> dict[str, list[TrialResult]]:
        """The others, by label."""
        groups: dict[str, list[TrialResult]] = defaultdict(list)
        for trial in self.trials:
            if trial.label != "fp32":
                groups[trial.label].append(trial)
        return dict(groups)

    @cached_property
    def prediction(self) -> Prediction:
        """Of the tensors that some trial held in fp16; of all, if none got so far."""
        held = {_tensor(layer) for trial in self.trials for layer in trial.layers}
        groups: dict[_Tensor, list[GradientHistogram]] = defaultdict(list)
        for trial in self.reference:
            for histogram in trial.histograms:
                if _tensor(histogram) in held or not held:
                    groups[_tensor(histogram)].append(histogram)
        return Prediction([_together(histograms) for histograms in groups.values()])

    def matches(self, label: str) -> bool:
        """Whether runs end where fp32's do or lower, by their last losses with the same seeds.

        Seeds with which fp32 itself did not end are not compared.
        """
        losses = {trial.seed: _final(trial) for trial in self.half[label]}
        ended = {seed: loss for seed, loss in losses.items() if loss is not None}
        differences = [
            loss - self.exact[seed] for seed, loss in ended.items() if seed in self.exact
        ]
        if not differences or len(ended) < len(losses):
            return False
        error = standard_error(differences) or 0.0
        firsts = [trial.first_loss or 0.0 for trial in self.reference if trial.seed in self.exact]
        span = self.learnt or abs(statistics.fmean(firsts))
        allowed = max(LEARNT * span, min(2 * error, NOISE * span))
        return statistics.fmean(differences) <= allowed  # NaN is not

    @cached_property
    def learnt(self) -> float:
        """First loss minus final one, in fp32; 0 where it learnt nothing."""
        falls = [
            trial.first_loss - self.exact[trial.seed]
            for trial in self.reference
            if trial.seed in self.exact
            and trial.first_loss is not None
            and math.isfinite(trial.first_loss)
        ]
        return max(0.0, statistics.fmean(falls)) if falls else 0.0

    @cached_property
    def matching(self) -> tuple[str, ...]:
        """Labels of the trials that match fp32."""
        return tuple(label for label in self.half if self.matches(label))

    def rows(self) -> tuple[dict[str, Any], ...]:
        """One for each label but fp32's: what was predicted, and what its runs were like."""
        return tuple(self._row(label, trials) for label, trials in self.half.items())

    def _row(self, label: str, trials: Sequence[TrialResult]) -> dict[str, Any]:
        scale, prediction = _scale(trials[0]), self.prediction
        predicted: dict[_Tensor, LayerFractions] = {}
        total = None
        if isinstance(scale, float) and prediction.histograms:
            predicted = {_tensor(layer): layer for layer in prediction.layers(scale)}
            total = self._total(scale)
        measured: dict[_Tensor, list[LayerFractions]] = defaultdict(list)
        for trial in trials:
            for layer in trial.layers:
                measured[_tensor(layer)].append(layer)
        means = {which: _mean([one.fractions for one in own]) for which, own in measured.items()}
        weights = {_tensor(one): one.elements * (1 - one.zeros) for one in prediction.histograms}
        losses = [t.loss for t in trials if t.loss is not None and math.isfinite(t.loss)]
        errors = [trial.gradient_error for trial in trials if trial.gradient_error]
        skips = statistics.fmean(trial.skipped for trial in trials)
        steps = statistics.fmean(trial.steps for trial in trials)
        return {
            "label": label,
            "scale": scale,
            "predicted": total,
            "measured": _total(means, weights),
            "loss": statistics.fmean(losses) if losses else None,
            "matches_fp32": label in self.matching,
            "skips": skips,
            "skip_rate": skips / steps if steps else 0.0,
            "cosine": statistics.fmean(e.cosine for e in errors) if errors else None,
            "relative_error": statistics.fmean(e.relative for e in errors) if errors else None,
            "status": next((t.status for t in trials if t.status != "done"), "done"),
            "layers": [
                {
                    **own[0].model_dump(exclude={"fractions"}),
                    "predicted": predicted[which].fractions.model_dump()
                    if which in predicted
                    else None,
                    "measured": means[which].model_dump(),
                }
                for which, own in measured.items()
            ],
        }

    def predicted(self) -> tuple[dict[str, Any], ...]:
        """What is predicted for every scale that is judged: in total, and of each tensor."""
        if not self.prediction.histograms:
            return ()
        return tuple(
            {
                "scale": scale,
                "total": self._total(scale),
                "layers": [
                    {"name": one.name, "tensor": one.tensor, **one.fractions.model_dump()}
                    for one in self.prediction.layers(scale)
                ],
            }
            for scale in SCALES
        )

    def _total(self, scale: float) -> dict[str, Any]:
        """Of all values, and what of the prediction is to be relied on."""
        total, reliable = self.prediction.total(scale), scale >= RELIABLE
        layers_reliable = reliable and total.underflow <= LAYERS_LOST
        return {**total.model_dump(), "reliable": reliable, "layers_reliable": layers_reliable}

    def recommended(self) -> dict[str, Any]:
        """The policy to take, with its evidence."""
        if not self.exact:
            if any(trial.status == "diverged" or _has_nan_loss(trial) for trial in self.reference):
                return self._nothing(
                    "The fp32 run diverged: no loss scale helps, look at `optim.lr`."
                )
            return self._nothing("There is no fp32 run to compare with: it did not end.")
        if reason := self._unscalable():
            return self._nothing(reason)
        if not self.prediction.histograms:
            return self._nothing("No gradient that was sampled is finite and not zero.")
        return self._topless() or self._unscaled() or self._windowless() or self._scaled()

    def _nothing(self, why: str) -> dict[str, Any]:
        return self._answer(None, None, None, why)

    def _answer(
        self,
        policy: Literal["dynamic", "static", "none"] | None,
        scale: float | None,
        setting: str | None,
        why: str,
    ) -> dict[str, Any]:
        confirmed = self._tried(setting)
        if confirmed is False:
            why += " Its run did not end where fp32 did."
        if window := self.window if policy else None:
            low, top = window
            why += f" Window: {power_text(low)} to {power_text(top)}, {_bits(top, low)}."
        left_out = [str(t.seed) for t in self.reference if t.seed not in self.exact]
        if self.exact and left_out:
            why += f" Without seed {', '.join(left_out)}, with which fp32 did not end."
        if policy and not self.learnt:
            why += " But fp32 learnt nothing in so few steps: runs say little, take more `--steps`."
        return {
            "policy": policy,
            "init_scale": scale,
            "window_bits": math.log2(window[1] / window[0]) if window else None,
            "window": list(window) if window else None,
            "knee": self.knee,
            "set": setting,
            "why": why,
            "confirmed": confirmed or False,
        }

    def _tried(self, setting: str | None) -> bool | None:
        """Whether the runs with a setting match fp32; None without any."""
        tried = [label for label, trials in self.half.items() if setting in trials[0].settings]
        return any(label in self.matching for label in tried) if tried else None

    @cached_property
    def window(self) -> tuple[float, float] | None:
        """The scales, from the least to the largest, that lose little and overflow nowhere."""
        return None if self.knee is None or self.knee > self.top else (self.knee, self.top)

    @cached_property
    def knee(self) -> float | None:
        """The least power of two at which no more than `LOST` is lost.

        Below `RELIABLE` only runs say that: not less than the least scale that was seen to work.
        """
        if not self.prediction.histograms:
            return None
        least = min([RELIABLE, *self._good])
        kept = (s for s in SCALES if s >= least and self.prediction.total(s).underflow <= LOST)
        return next(kept, None)

    @property
    def _good(self) -> list[float]:
        """The fixed scales whose runs match fp32."""
        scales = [_scale(self.half[label][0]) for label in self.matching]
        return [scale for scale in scales if isinstance(scale, float)]

    @cached_property
    def top(self) -> float:
        """The largest power of two at which nothing overflows, by prediction and by the runs.

        0 where there is none.
        """
        fitting = (s for s in SCALES if s <= self.prediction.largest_scale and s < self._skipping)
        return max(fitting, default=0.0)

    @cached_property
    def _skipping(self) -> float:
        """The least fixed scale at which runs skip steps."""
        skipped: dict[float, bool] = {}
        for trials in self.half.values():
            own = [trial for trial in trials if trial.steps and not _has_nan_loss(trial)]
            if own and isinstance(scale := _scale(own[0]), float):
                skipped[scale] = any(trial.skipped for trial in own)
        clean = max((scale for scale, some in skipped.items() if not some), default=0.0)
        # A run that skips below one that does not has gone wrong for another reason.
        return min((s for s, some in skipped.items() if some and s > clean), default=math.inf)

    def _unscalable(self) -> str | None:
        """Why no scale works, where that is no matter of the scale."""
        if self.matching or not self.half:
            return None
        half = [trial for trials in self.half.values() for trial in trials]
        trained = [trial for trial in half if trial.steps]
        if not trained:
            reasons = dict.fromkeys(trial.reason or trial.status for trial in half)
            return f"No run in fp16 trained: {'; '.join(reasons)}."
        held = {one.module for one in self.prediction.histograms if one.tensor == "grad_output"}
        largest: dict[str, float] = {}
        for trial in self.reference:
            for module, value in trial.outputs_max.items():
                if module in held and value >= LIMIT:
                    largest[module] = max(value, largest.get(module, 0.0))
        if largest:
            named = ", ".join(f"`{name}` ({value:.3g})" for name, value in largest.items())
            return (
                f"No scale works here: {named} overflows in forward, where no loss scale helps: "
                "its outputs in fp32 are above fp16's maximum, and no run in fp16 ended where fp32 "
                "did. Take bf16, or make these outputs smaller: of a layer in "
                "`precision.sensitive_layers` they return to fp16, but for the last layer's."
            )
        if all(_is_nan(trial.first_loss) for trial in trained):
            return (
                "No scale works here: in every run in fp16 the loss itself is NaN or infinite in "
                "forward, where no loss scale helps. Take bf16, or make what overflows smaller."
            )
        if all(_is_nan(trial.loss) for trial in trained):
            return (
                "In every run in fp16 the loss became NaN or infinite: `mptrain diagnose` of one, "
                f"such as `trials/{trained[0].run}` of this sweep, says why."
            )
        return None

    def _topless(self) -> dict[str, Any] | None:
        """Why there is none, where even the least scale that is judged is too large."""
        if self.top:
            return None
        why = f"Even {self._overflow}."
        if self.matching:
            matching = ", ".join(f"`{label}`" for label in self.matching)
            why += f" But runs ended where fp32 did: {matching}."
        return self._nothing(why)

    def _unscaled(self) -> dict[str, Any] | None:
        """No scaling, where nothing is lost without and no run says otherwise."""
        if self.window is None or not self.window[0] <= 1 <= self.window[1]:
            return None
        tried = [label for label, trials in self.half.items() if _scale(trials[0]) == 1.0]
        if tried and not any(label in self.matching for label in tried):
            return None
        lost = self.prediction.total(1.0).underflow
        why = f"No scaling needed: without it {share_text(lost)} of the gradients' values are lost"
        found = self._answer(
            "none",
            1.0,
            "precision.loss_scale={kind: none}",
            f"{why}, and the run ends where fp32 does." if tried else f"{why}.",
        )
        return {**found, "confirmed": bool(tried)}  # a scale of 1 is the same arithmetic

    def _windowless(self) -> dict[str, Any] | None:
        """Why there is none, where some layer always loses or overflows and no run is good."""
        best = self.top
        lost = self.prediction.total(best).underflow
        if self.window or self.matching or not self.half or lost <= LOST:
            return None
        low = max(self.prediction.layers(best), key=lambda layer: layer.fractions.underflow)
        overflow = f", while {self._overflow}" if best < SCALES[-1] else ""
        return self._nothing(
            f"No window: at {power_text(best)} `{low.module}` loses "
            f"{share_text(low.fractions.underflow)} of its gradient{overflow}, and no run in fp16 "
            f"ended where fp32 did. Take bf16, which has the range of fp32."
        )

    @property
    def _overflow(self) -> str:
        """What happens at the first scale above the top, where that is not the last one judged."""
        if self.top < self.prediction.largest_scale:
            return f"at {power_text(self._skipping)} runs skip steps"
        high = max(self.prediction.histograms, key=lambda one: one.max)
        return f"at {power_text(2 * self.top or SCALES[0])} `{high.module}` overflows"

    def _scaled(self) -> dict[str, Any]:
        """A dynamic scale that begins in the window; a fixed one where only that was seen to work.

        Where the window is empty, the largest scale that does not overflow.
        """
        low, top = self.window or (self.top, self.top)
        scale = max(low, min(top / 2**HEADROOM, MAX_SCALE))
        if self.window:
            why = (
                f"In the window at most {LOST:.0%} of the gradients' values that are not zero are "
                f"lost and nothing overflows; {power_text(scale)} leaves {_bits(top, scale)} below "
                f"its top."
            )
        else:
            lost = self.prediction.total(scale).underflow
            why = (
                f"{power_text(scale)} is the largest scale "
                f"{'without overflow' if scale < SCALES[-1] else 'that is judged'}, and still "
                f"loses {share_text(lost)} of the gradients' values that are not zero."
            )
            if scale < RELIABLE:
                why += " Below 1 that is unreliable: its run says whether it is enough."
        # The bounds as well: the recipe's own may not hold it.
        fields = {
            "init_scale": scale,
            "min_scale": min(scale, RELIABLE),
            "max_scale": max(scale, MAX_SCALE),
        }
        values = ", ".join(f"{name}: {number_text(value)}" for name, value in fields.items())
        dynamic = f"precision.loss_scale={{kind: dynamic, {values}}}"
        if self._tried(dynamic) is False and (fixed := self._fixed(low, top, scale)):
            return self._answer(
                "static",
                fixed,
                f"precision.loss_scale={{kind: static, scale: {number_text(fixed)}}}",
                f"{why} A dynamic scale did not end where fp32 did, but {power_text(fixed)} did.",
            )
        return self._answer("dynamic", scale, dynamic, why)

    def _fixed(self, low: float, top: float, wanted: float) -> float | None:
        """The fixed scale in the window nearest to the wanted one whose run matches fp32."""
        fixed = [scale for scale in self._good if low <= scale <= top]
        return min(fixed, key=lambda scale: abs(math.log2(scale / wanted)), default=None)


def _final(trial: TrialResult) -> float | None:
    """The final loss of a run that ended with one."""
    ended = trial.status == "done" and trial.loss is not None and math.isfinite(trial.loss)
    return trial.loss if ended else None


def _has_nan_loss(trial: TrialResult) -> bool:
    """Whether its loss was NaN or infinite, first or last: its skips are not the scale's doing."""
    return _is_nan(trial.first_loss) or _is_nan(trial.loss)


def _is_nan(loss: float | None) -> bool:
    return loss is not None and not math.isfinite(loss)


def _tensor(one: GradientHistogram | LayerFractions) -> _Tensor:
    return one.tensor, one.name


def _scale(trial: TrialResult) -> float | Literal["dynamic"]:
    """The scale of a trial that has one and the same in every step."""
    given = [text for text in trial.settings if text.startswith("precision.loss_scale")]
    if given and "kind: none" in given[-1]:
        return 1.0
    fixed = given and re.search(r"kind: static, scale: ([^,}]+)", given[-1])
    return float(fixed[1]) if fixed else "dynamic"


def _together(histograms: Sequence[GradientHistogram]) -> GradientHistogram:
    """One tensor's, of all seeds."""
    return histograms[0].model_copy(
        update={
            "max": max(one.max for one in histograms),
            "zeros": statistics.fmean(one.zeros for one in histograms),
            **summed((one.lowest, one.counts) for one in histograms),
        }
    )


def _mean(fractions: Sequence[Fractions], weights: Sequence[float] | None = None) -> Fractions:
    return Fractions(
        **{
            name: statistics.fmean((getattr(one, name) for one in fractions), weights=weights)
            for name in Fractions.model_fields
        }
    )


def _total(
    fractions: Mapping[_Tensor, Fractions], weights: Mapping[_Tensor, float]
) -> dict[str, float] | None:
    """Of all values that are not zero in fp32."""
    known = [which for which in fractions if weights.get(which)]
    if not known:
        return None
    shares = [fractions[which] for which in known]
    return _mean(shares, [weights[which] for which in known]).model_dump()


def _bits(top: float, scale: float) -> str:
    bits = round(math.log2(top / scale))
    return f"{bits} bit{'s' if bits != 1 else ''}"
