"""Changes that mend a cause: an override of our recipe, or code and arguments for another loop."""

from __future__ import annotations

import math

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Arguments, Suggestion
from mpcli.precision.observe import LOSS
from mpcli.recipe.dump import written
from mpcli.recipe.optim import Adam, AdamW
from mpcli.recipe.precision import DynamicScale

FP16_MAX = 65504.0


def _of_loop(what: str, code: str | None = None, arguments: Arguments | None = None) -> Suggestion:
    """A change of somebody's own loop."""
    return Suggestion(what=what, code=code, arguments=arguments or {})


_SCALED_STEP = "scaler.scale(loss).backward()\nscaler.step(optimizer)\nscaler.update()"


def _clip_code(evidence: Evidence, limit: float, *, is_norm: bool) -> str:
    """Right before the optimizer's step, of unscaled gradients."""
    function = "clip_grad_norm_" if is_norm else "clip_grad_value_"
    clip = f"torch.nn.utils.{function}(model.parameters(), {limit:g})"
    return f"scaler.unscale_(optimizer)\n{clip}" if has_scaler(evidence) else clip


def has_scaler(evidence: Evidence) -> bool:
    """Whether a loop has a GradScaler."""
    foreign = evidence.foreign
    return foreign is not None and foreign.scaler is not None


def bf16(evidence: Evidence) -> Suggestion:
    """The same kind of mode in bf16, which has the range of fp32."""
    if evidence.is_foreign:
        return _of_loop(
            "train in bf16, which has the range of fp32, without a scaler",
            f"with torch.autocast({device(evidence)!r}, dtype=torch.bfloat16):\n    loss = ...",
            {"fp16": False, "bf16": True} if evidence.is_trainer else None,
        )
    mode = evidence.recipe.precision.mode if evidence.recipe else "fp16"
    new = mode.replace("fp16", "bf16") if mode.startswith("fp16") else "bf16"
    return Suggestion(
        what=f"train in {new}, which has the range of fp32", set=_of_mode(evidence, new)
    )


def _of_mode(evidence: Evidence, mode: str) -> tuple[str, ...]:
    """A mode that needs no loss scale, without what only the one before may have."""
    settings = (f"precision.mode={mode}", "precision.loss_scale={kind: none}")
    if evidence.recipe and evidence.recipe.precision.stochastic_rounding and mode != "bf16-pure":
        return (*settings, "precision.stochastic_rounding=false")
    return settings


def fp32(evidence: Evidence) -> Suggestion:
    """fp32 everywhere."""
    if evidence.is_foreign:
        return _of_loop(
            "train in fp32",
            f"scaler = torch.amp.GradScaler({device(evidence)!r}, enabled=False)\n"
            f"with torch.autocast({device(evidence)!r}, enabled=False):\n    loss = ...",
            {"fp16": False, "bf16": False} if evidence.is_trainer else None,
        )
    return Suggestion(what="train in fp32", set=_of_mode(evidence, "fp32"))


def wider(evidence: Evidence) -> Suggestion | None:
    """The next format with more range, or more precision: bf16 after fp16, fp32 after bf16.

    Where the format is not known, a loss that is scaled says fp16. None after fp32.
    """
    if evidence.compute == "fp16" or (evidence.compute == "-" and evidence.scales_loss):
        return bf16(evidence)
    return fp32(evidence) if evidence.compute == "bf16" else None


def wide(evidence: Evidence) -> list[Suggestion]:
    """`wider`, and fp32 where that is another one."""
    found = [wider(evidence), fp32(evidence)]
    return [one for number, one in enumerate(found) if one and one not in found[:number]]


def fp32_module(evidence: Evidence, module: str) -> list[Suggestion]:
    """One module in fp32; of what runs outside of any module, all of it that can be."""
    if not module:
        return wide(evidence)
    layer = fp32_layers(evidence, (module,))
    return [layer, *wide(evidence)] if module == LOSS else [layer]


def fp32_layers(evidence: Evidence, layers: tuple[str, ...]) -> Suggestion:
    """These layers (module names, groups or class names) in fp32, the rest as it is."""
    names = ", ".join(layers)
    if evidence.is_foreign:
        return _of_loop(f"compute {names} in fp32", _in_fp32(evidence, layers))
    before = evidence.recipe.precision.sensitive_layers if evidence.recipe else ()
    listed = [*before, *(name for name in layers if name not in before)]
    settings = (f"precision.sensitive_layers={written(listed)}",)
    return Suggestion(what=f"compute {names} in fp32", set=settings)


def _in_fp32(evidence: Evidence, layers: tuple[str, ...]) -> str:
    """Code that can be run once the model is made; names are of modules or of their classes."""
    kind = device(evidence)
    return f"""\
def fp32(x):
    return x.float() if torch.is_tensor(x) and x.is_floating_point() else x

def all_fp32(layer, args, kwargs):
    return torch.utils._pytree.tree_map(fp32, (args, kwargs))

for name, layer in model.named_modules():
    if {{name, type(layer).__name__}} & {set(layers)}:
        layer.float()
        layer.forward = torch.autocast({kind!r}, enabled=False)(layer.forward)
        layer.register_forward_pre_hook(all_fp32, with_kwargs=True)"""


def device(evidence: Evidence) -> str:
    """The type of device that a loop trains on."""
    foreign = evidence.foreign
    return foreign.device.partition(":")[0] if foreign else "cuda"


def dynamic_scale(evidence: Evidence) -> Suggestion | None:
    """A loss scale that finds its own level; None where there is one as torch has it already."""
    if evidence.is_foreign:
        return _of_loop(
            "let the loss scale find its level",
            f"scaler = torch.amp.GradScaler({device(evidence)!r})\n{_SCALED_STEP}",
            {"fp16": True} if evidence.is_trainer else None,
        )
    default = DynamicScale(kind="dynamic")
    now = evidence.recipe.precision.loss_scale if evidence.recipe else None
    # Settings of a policy that is dynamic already stay, if they are not named.
    named = dict(default) if isinstance(now, DynamicScale) else {}
    changed = {name: value for name, value in named.items() if value != getattr(now, name)}
    if now == default:
        return None
    fields = ", ".join(f"{name}: {_exact(value)}" for name, value in changed.items())
    settings = (f"precision.loss_scale={{kind: dynamic{', ' * bool(fields)}{fields}}}",)
    return Suggestion(what="let the loss scale find its level", set=settings)


def _exact(value: float) -> str:
    """A number of a recipe, every digit of it."""
    return str(int(value)) if float(value).is_integer() else written(value)


def static_scale(evidence: Evidence, largest: float) -> Suggestion:
    """The largest power of two that leaves a factor of 2 to fp16's overflow.

    S = 2^(floor(log2(65504 / max)) - 1), within [1, 2^24].

    Args:
        largest: magnitude of an unscaled gradient in fp16, above 0.
    """
    exponent = math.floor(math.log2(FP16_MAX / largest)) - 1
    scale = 2.0 ** min(max(exponent, 0), 24)
    if evidence.is_foreign:
        code = (
            f"scaler = torch.amp.GradScaler({device(evidence)!r}, init_scale={scale:.0f}, "
            "growth_interval=10**9)"
        )
        return _of_loop(f"use a loss scale of {scale:.0f}", code)
    settings = (f"precision.loss_scale={{kind: static, scale: {scale:.0f}}}",)
    return Suggestion(what=f"use a loss scale of {scale:.0f}", set=settings)


def clip_norm(evidence: Evidence, limit: float) -> Suggestion:
    """Clip the L2 norm of all gradients.

    Args:
        limit: usually a norm of good steps; two digits of it are taken.
    """
    limit = float(f"{limit:.2g}")
    if evidence.is_foreign:
        return _of_loop(
            f"clip gradients to a norm of {limit:g}",
            _clip_code(evidence, limit, is_norm=True),
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
            f"model.float()\nwith torch.autocast({device(evidence)!r}, dtype=torch."
            f"{'bfloat16' if evidence.compute == 'bf16' else 'float16'}):\n    loss = ...",
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


def autocast(evidence: Evidence) -> Suggestion:
    """Of a loop: half precision where its forwards are; on a CPU bf16, which needs no scaler."""
    kind = device(evidence)
    if kind == "cpu":
        return bf16(evidence)
    return _of_loop(
        "run the forward and the loss under autocast",
        f"with torch.autocast({kind!r}, dtype=torch.float16):\n    loss = ...",
        {"fp16": True} if evidence.is_trainer else None,
    )


def half_layers(evidence: Evidence, layers: tuple[str, ...]) -> Suggestion | None:
    """These layers in half too, if nothing speaks against it."""
    if not evidence.is_foreign:
        return _less_sensitive(evidence, layers)
    what = "if they need no fp32, let autocast have them: without `.float()` or `enabled=False`"
    code = f"with torch.autocast({device(evidence)!r}):\n    x = {layers[0]}(x)"
    return _of_loop(what, code)


def _less_sensitive(evidence: Evidence, layers: tuple[str, ...]) -> Suggestion | None:
    """Of a run of ours, whose plan says which pattern each layer is sensitive by."""
    why = {row.name: row.why for row in (evidence.plan.modules if evidence.plan else ())}
    patterns = evidence.recipe.precision.sensitive_layers if evidence.recipe else ()
    given = [p for p in patterns if any(f"({p})" in why.get(layer, "") for layer in layers)]
    if not given:
        return None
    left = [pattern for pattern in patterns if pattern not in given]
    return Suggestion(
        what=f"if they need no fp32, take {', '.join(given)} out of `sensitive_layers`",
        set=(f"precision.sensitive_layers={written(left)}",),
    )


def clip_unscaled(evidence: Evidence, limit: float, *, is_norm: bool) -> Suggestion:
    """Of a loop: the clipping that it has, at its right place."""
    code = f"{_clip_code(evidence, limit, is_norm=is_norm)}\nscaler.step(optimizer)"
    return _of_loop("unscale before clipping", code)


def scaler_step(evidence: Evidence) -> Suggestion:
    """Of a loop: let the scaler unscale, and leave out steps whose gradients are not finite."""
    what = "let the scaler take the step: it unscales, and leaves out what is not finite"
    return _of_loop(what, _SCALED_STEP)


def window(evidence: Evidence, *, zero: bool, scale: bool) -> Suggestion:
    """Of a loop: an optimizer step's backwards first, then all that is done once.

    Args:
        zero: only the zeroing is missing.
        scale: only some losses are not scaled.
    """
    if zero:
        code = "optimizer.zero_grad()  # after each optimizer.step()"
        return _of_loop("zero the gradients after each step of the optimizer", code)
    if scale:
        return _of_loop("scale every loss", "scaler.scale(loss).backward()  # for each loss")
    return _of_loop(
        "unscale, step and update once for all micro-batches of a step",
        "for micro_batch in micro_batches:\n"
        "    scaler.scale(loss_of(micro_batch) / len(micro_batches)).backward()\n"
        "scaler.unscale_(optimizer)\nscaler.step(optimizer)\nscaler.update()\n"
        "optimizer.zero_grad()",
    )


def unfused(evidence: Evidence) -> Suggestion:
    """Of a loop: an optimizer that the scaler leaves out, instead of one that leaves itself out."""
    foreign = evidence.foreign
    name = foreign.optimizer if foreign else "SGD"
    return _of_loop(
        "use the optimizer without fused=True",
        f"optimizer = torch.optim.{name}(..., fused=False)",
    )


def lower_first_scale(evidence: Evidence) -> Suggestion:
    """Of a loop: begin at a scale of which no step is skipped, a factor of 2 below the first."""
    history = evidence.history
    good = history.scale[history.applied]
    scale = float(good[0]) / 2 if len(good) else 1.0
    return _of_loop(
        f"begin with a loss scale of {scale:g}, so that the first step is not skipped",
        f"scaler = torch.amp.GradScaler({device(evidence)!r}, init_scale={scale:.0f})",
    )


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
