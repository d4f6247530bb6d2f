"""Changes that mend a cause: an override of our recipe, or code and arguments for another loop."""

from __future__ import annotations

import math

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Arguments, Suggestion
from mpcli.recipe.dump import written
from mpcli.recipe.optim import Adam, AdamW

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


def dynamic_scale(evidence: Evidence) -> Suggestion:
    """A loss scale that finds its own level."""
    if evidence.is_foreign:
        return _of_loop(
            "let the loss scale find its level",
            "scaler = torch.amp.GradScaler(device) with its defaults; scaler.scale(loss).backward()"
            "; scaler.step(optimizer); scaler.update()",
            {"fp16": True} if evidence.is_trainer else None,
        )
    settings = ("precision.loss_scale={kind: dynamic}",)
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


def warmup(evidence: Evidence) -> Suggestion:
    """A learning rate that rises over the first tenth of the run."""
    what = "let the learning rate rise over the first tenth of the run"
    if evidence.is_foreign:
        code = "torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps // 10)"
        return _of_loop(what, code, {"warmup_ratio": 0.1} if evidence.is_trainer else None)
    return Suggestion(what=what, set=("optim.schedule.warmup=0.1",))


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


def whole_batches() -> Suggestion:
    """One forward for each step of a run of ours."""
    return Suggestion(
        what="let BatchNorm see the whole batch", set=("train.micro_batch_size=null",)
    )


def smaller_micro_batch(size: int) -> Suggestion:
    """Fewer samples in a forward of a run of ours; the global batch stays."""
    return Suggestion(
        what=f"compute {size} samples at a time, and add up their gradients",
        set=(f"train.micro_batch_size={size}",),
    )


def activation_checkpointing() -> Suggestion:
    """Of a run of ours."""
    return Suggestion(
        what="compute activations again in backward, at a third more time",
        set=("engine.activation_checkpointing=true",),
    )


def half_activations() -> Suggestion:
    """Of a run of ours in fp32."""
    return Suggestion(what="train in bf16", set=("precision.mode=bf16",))


def bf16_pure() -> Suggestion:
    """Everything of a run of ours in two bytes."""
    return Suggestion(
        what="store weights, gradients and optimizer state in bf16",
        set=(
            "precision.mode=bf16-pure",
            "precision.stochastic_rounding=true",
            "precision.loss_scale={kind: none}",
        ),
    )
