"""Changes that mend a cause: an override of our recipe, or code and arguments for another loop."""

from __future__ import annotations

import math

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Arguments, Suggestion
from mpcli.recipe.dump import written
from mpcli.recipe.optim import Adam, AdamW
from mpcli.recipe.precision import DynamicScale

FP16_MAX = 65504.0


def _of_loop(what: str, code: str | None = None, arguments: Arguments | None = None) -> Suggestion:
    """A change of somebody's own loop."""
    return Suggestion(what=what, code=code, arguments=arguments or {})


def bf16(evidence: Evidence) -> Suggestion:
    """The same kind of mode in bf16, which has the range of fp32."""
    if evidence.is_foreign:
        return _of_loop(
            "train in bf16, which has the range of fp32, without a scaler",
            "torch.autocast(device, dtype=torch.bfloat16), and no GradScaler",
            {"fp16": False, "bf16": True} if evidence.is_trainer else None,
        )
    mode = evidence.recipe.precision.mode if evidence.recipe else "fp16"
    new = mode.replace("fp16", "bf16") if mode.startswith("fp16") else "bf16"
    settings = (f"precision.mode={new}", "precision.loss_scale={kind: none}")
    return Suggestion(what=f"train in {new}, which has the range of fp32", set=settings)


def fp32(evidence: Evidence) -> Suggestion:
    """fp32 everywhere."""
    if evidence.is_foreign:
        return _of_loop(
            "train in fp32",
            "leave out torch.autocast and the GradScaler",
            {"fp16": False, "bf16": False} if evidence.is_trainer else None,
        )
    settings = ("precision.mode=fp32", "precision.loss_scale={kind: none}")
    return Suggestion(what="train in fp32", set=settings)


def wider(evidence: Evidence) -> Suggestion | None:
    """The next format with more range, or more precision: bf16 after fp16, fp32 after bf16.

    Where the format is not known, a loss that is scaled says fp16. None after fp32.
    """
    if evidence.compute == "fp16" or (evidence.compute == "-" and evidence.scales_loss):
        return bf16(evidence)
    return fp32(evidence) if evidence.compute == "bf16" else None


def fp32_layers(evidence: Evidence, layers: tuple[str, ...]) -> Suggestion:
    """These layers (module names, groups or class names) in fp32, the rest as it is."""
    names = ", ".join(layers)
    if evidence.is_foreign:
        return _of_loop(
            f"compute {names} in fp32",
            f"in the forward of {names}: `with torch.autocast(device, enabled=False): "
            "layer(x.float())`",
        )
    before = evidence.recipe.precision.sensitive_layers if evidence.recipe else ()
    listed = [*before, *(name for name in layers if name not in before)]
    settings = (f"precision.sensitive_layers={written(listed)}",)
    return Suggestion(what=f"compute {names} in fp32", set=settings)


def dynamic_scale(evidence: Evidence) -> Suggestion | None:
    """A loss scale that finds its own level; None where there is one as torch has it already."""
    if evidence.is_foreign:
        return _of_loop(
            "let the loss scale find its level",
            "scaler = torch.amp.GradScaler(device) with its defaults; scaler.scale(loss).backward()"
            "; scaler.step(optimizer); scaler.update()",
            {"fp16": True} if evidence.is_trainer else None,
        )
    default = DynamicScale(kind="dynamic")
    now = evidence.recipe.precision.loss_scale if evidence.recipe else None
    # Settings of a policy that is dynamic already stay, if they are not named.
    named = dict(default) if isinstance(now, DynamicScale) else {}
    changed = {name: value for name, value in named.items() if value != getattr(now, name)}
    if now == default:
        return None
    fields = ", ".join(f"{name}: {value:g}" for name, value in changed.items())
    settings = (f"precision.loss_scale={{kind: dynamic{', ' * bool(fields)}{fields}}}",)
    return Suggestion(what="let the loss scale find its level", set=settings)


def static_scale(evidence: Evidence, largest: float) -> Suggestion:
    """The largest power of two that leaves a factor of 2 to fp16's overflow.

    S = 2^(floor(log2(65504 / max)) - 1), within [1, 2^24].

    Args:
        largest: magnitude of an unscaled gradient in fp16, above 0.
    """
    exponent = math.floor(math.log2(FP16_MAX / largest)) - 1
    scale = 2.0 ** min(max(exponent, 0), 24)
    if evidence.is_foreign:
        code = f"torch.amp.GradScaler(device, init_scale={scale:g}, growth_interval=10**9)"
        return _of_loop(f"use a loss scale of {scale:g}", code)
    settings = (f"precision.loss_scale={{kind: static, scale: {scale:g}}}",)
    return Suggestion(what=f"use a loss scale of {scale:g}", set=settings)


def clip_norm(evidence: Evidence, limit: float) -> Suggestion:
    """Clip the L2 norm of all gradients.

    Args:
        limit: usually a norm of good steps; two digits of it are taken.
    """
    limit = float(f"{limit:.2g}")
    if evidence.is_foreign:
        return _of_loop(
            f"clip gradients to a norm of {limit:g}",
            "scaler.unscale_(optimizer); torch.nn.utils.clip_grad_norm_(model.parameters(), "
            f"{limit:g}), right before the step",
            {"max_grad_norm": limit} if evidence.is_trainer else None,
        )
    settings = (f"train.clip={{kind: norm, max_norm: {limit:g}}}",)
    return Suggestion(what=f"clip gradients to a norm of {limit:g}", set=settings)


def learning_rate(evidence: Evidence, factor: float) -> Suggestion:
    """The learning rate times a factor, in two digits."""
    now = (
        evidence.recipe.optim.lr if evidence.recipe else float(max(evidence.history.lr, default=0))
    )
    new = float(f"{now * factor:.2g}")
    if evidence.is_foreign:
        arguments = {"learning_rate": new} if evidence.is_trainer else None
        return _of_loop(f"use a learning rate of {new:g}", f"lr={new:g}", arguments)
    return Suggestion(what=f"use a learning rate of {new:g}", set=(f"optim.lr={new:g}",))


def masters(evidence: Evidence) -> Suggestion:
    """fp32 master weights beside half ones."""
    if evidence.is_foreign:
        return _of_loop(
            "keep the weights in fp32 and compute in half under autocast",
            "model.float(); with torch.autocast(device, dtype=...): loss = ...",
        )
    mode = evidence.recipe.precision.mode if evidence.recipe else "fp16-pure"
    new = f"{mode.partition('-')[0]}-master"
    settings = [f"precision.mode={new}"]
    if evidence.recipe and evidence.recipe.precision.stochastic_rounding:
        settings.append("precision.stochastic_rounding=false")
    return Suggestion(what=f"keep fp32 master weights ({new})", set=tuple(settings))


def stochastic_rounding(evidence: Evidence) -> Suggestion | None:
    """Of a run of ours in `bf16-pure`, which alone has it."""
    if not evidence.recipe or evidence.recipe.precision.mode != "bf16-pure":
        return None
    settings = ("precision.stochastic_rounding=true",)
    return Suggestion(what="round updated weights stochastically", set=settings)


def adam_eps(evidence: Evidence, eps: float) -> Suggestion:
    """Another epsilon of Adam."""
    if evidence.is_foreign:
        arguments = {"adam_epsilon": eps} if evidence.is_trainer else None
        return _of_loop(f"use eps={eps:g} in Adam", f"eps={eps:g}", arguments)
    assert not evidence.recipe or isinstance(evidence.recipe.optim, Adam | AdamW)
    return Suggestion(what=f"use eps {eps:g}", set=(f"optim.eps={eps:g}",))


_GUARDS = {
    "softmax": "let no row be masked throughout: leave one key open in each",
    "rsqrt": "torch.rsqrt(x + 1e-6)",
    "sqrt": "torch.sqrt(x + 1e-8), or torch.sqrt(x.clamp_min(1e-8))",
    "norm": "(x.square().sum(dim) + 1e-12).sqrt(), whose gradient at 0 is 0",
    "log": "torch.log(x.clamp_min(1e-8))",
    "reciprocal": "1 / (x + 1e-8), for x >= 0",
    "div": "a / (b + 1e-8), for b >= 0",
    "pow": "x.clamp_min(1e-8) ** p",
    "cos": "torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))",
    "asin": "torch.asin(x.clamp(-1 + 1e-6, 1 - 1e-6))",
}
"""What keeps an operation inside its domain, by a part of its name; the first that fits."""


def guarded(module: str, operation: str) -> Suggestion:
    """An operation kept where its value and its gradient are finite."""
    code = next((code for part, code in _GUARDS.items() if part in operation), None)
    return Suggestion(
        what=f"in {module or 'the model'}, give `{operation}` no input at which "
        "it or its gradient is not finite; choosing with torch.where afterwards does not help, as "
        "0 * NaN is NaN",
        code=code,
    )


def leave_out_batch(evidence: Evidence, step: int) -> Suggestion:
    """A batch that is bad left out."""
    stops = evidence.recipe is not None and evidence.recipe.train.on_nonfinite == "stop"
    return Suggestion(
        what=f"clean the samples of step {step}, or leave such a batch out",
        set=("train.on_nonfinite=skip",) if stops else (),
        code="if not all(t.isfinite().all() for t in floating_point_tensors_of(batch)): continue",
    )
