"""The faults: what is done wrong, where, and what is right. Every class for every family.

A cell's truth (class, phases, layers) is for the score alone; a run has nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from torch import Tensor

from benchmarks.diagnose.task import Family
from mpcli.diagnose.finding import FindingId, Phase

FAMILIES: tuple[Family, ...] = get_args(Family)
Harm = Literal["loss", "memory", "repeat"]
FP32 = "precision.mode=fp32"
UNSCALED = "precision.loss_scale={kind: none}"
WIDE_SCALE = "precision.loss_scale={kind: dynamic, min_scale: 6e-8}"
"""As torch's GradScaler, which has no floor."""


@dataclass(frozen=True)
class Damage:
    """A file of weights, trained and then spoilt: what is written into one tensor."""

    tensor: str
    spoil: Callable[[Tensor], None]


@dataclass(frozen=True)
class Cell:
    """A fault in a family.

    Attributes:
        faulty: `--set` values of the recipe; of a loop, its task's options alone count.
        control: the same training without the fault; where the fault is one of precision, in fp32.
        phases: that are right; more than one where the fault lies between two.
        layers: that are right; none: the fault lies in no layer, and that is not scored.
        harm: in which way it differs from the control: by the loss of held-out images, by the bytes
            of activations, or by not being the same when it is repeated.
        repair: words of a suggestion without `set` -> what then stands for the change of code it
            asks for: `--set` values; the loop, or the file of weights, is the right one then.
        loop: a hand-written one of `loops.py`, instead of a recipe.
        damage: of the weights that the training begins with.
    """

    fault: FindingId
    family: Family
    phases: tuple[Phase, ...]
    faulty: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    harm: Harm = "loss"
    repair: tuple[str, tuple[str, ...]] | None = None
    loop: str | None = None
    damage: Damage | None = None

    @property
    def name(self) -> str:
        return f"{self.fault}/{self.family}"


def cells(seed: int) -> dict[str, Cell | str]:
    """Every class and family, by name: a cell, or why there is none; places are drawn by seed."""
    found: dict[str, Cell | str] = {}
    for fault, (phases, make) in FAULTS.items():
        for family in FAMILIES:
            about = make(family, Random(f"{seed} {fault} {family}"))
            name = f"{fault}/{family}"
            found[name] = about if isinstance(about, str) else Cell(
                fault, family, phases, **about
            )  # fmt: skip
    return found


def left_out(seed: int) -> Family:
    """The family that development does not look at."""
    return Random(f"{seed} left out").choice(FAMILIES)


Made = dict[str, object] | str
INNER = {"convnet": "conv", "residual": "conv1", "transformer": "up", "mlp": "linear"}
"""The layer of a block whose output its `norm` takes in, at once or after the activation."""


def sgd(lr: float) -> str:
    return f"optim={{kind: sgd, lr: {lr}, momentum: 0.9, schedule: {{kind: linear, warmup: 0.1}}}}"


def adam(kind: str = "adamw", **settings: float) -> str:
    said = "".join(f", {name}: {value}" for name, value in ({"lr": 0.01} | settings).items())
    return f"optim={{kind: {kind}{said}, schedule: {{kind: linear, warmup: 0.1}}}}"


def block(random: Random) -> int:
    """Not the last one: behind it nothing makes large values small again."""
    return random.randrange(2)


def underflow(family: Family, random: Random) -> Made:
    if family in ("convnet", "mlp"):
        small = "precision.loss_scale={kind: static, scale: 1e-6}"
        return {"faulty": (small,), "control": (FP32,)}
    # A mean over a million pixels, of which few count; Adam does not mind, with such an epsilon.
    mean = ("task.canvas=1e6", adam(eps=1e-15))
    return {"faulty": (*mean, UNSCALED), "control": (*mean, FP32)}


def forward_overflow(family: Family, random: Random) -> Made:
    number = block(random)
    scaled = ("task.activation=scaled", "task.gain=3e5", f"task.block={number}")
    return {
        "faulty": scaled,
        "control": (*scaled, FP32),
        "layers": (f"blocks.{number}.act",),
    }


def scale_too_high(family: Family, random: Random) -> Made:
    high = {
        "convnet": "{kind: static, scale: 16777216}",
        "residual": "{kind: dynamic, init_scale: 16777216, min_scale: 16777216}",
        "transformer": "{kind: scheduled, points: [[0, 65536], [6, 33554432]]}",
        "mlp": "{kind: static, scale: 67108864}",
    }[family]
    return {"faulty": (f"precision.loss_scale={high}",), "control": (FP32,)}


def scale_collapse(family: Family, random: Random) -> Made:
    number = block(random)
    log = ("task.activation=log", f"task.block={number}")
    return {
        "faulty": (*log, "task.offset=0", WIDE_SCALE),
        "control": (*log, FP32),
        "layers": (f"blocks.{number}.act",),
        "repair": (r"log|eps|zero|operation|clamp|add", (*log, WIDE_SCALE)),
    }


def backward_nonfinite(family: Family, random: Random) -> Made:
    number = block(random)
    root = ("task.activation=margin", f"task.block={number}")
    return {
        "faulty": (*root, "task.offset=0"),
        "control": (*root, "task.offset=1e-4", FP32),
        "layers": (f"blocks.{number}.act",),
        "repair": (r"root|sqrt|eps|norm|operation|clamp", (*root, "task.offset=1e-4")),
    }


def skip_storm(family: Family, random: Random) -> Made:
    growth = "growth_interval: 1, growth_factor: 4096, max_scale: 1e30"
    return {
        "faulty": (f"precision.loss_scale={{kind: dynamic, {growth}}}",),
        "control": (FP32,),
    }


def exploding_gradients(family: Family, random: Random) -> Made:
    lr = 0.4 if family == "residual" else 0.2
    deep = ("task.norm=none", f"optim={{kind: sgd, lr: {lr}, momentum: 0.9}}", *{
        "convnet": ("task.init=4",),
        "residual": ("task.depth=6",),
        "transformer": (),
        "mlp": ("task.init=3",),
    }[family])  # fmt: skip
    clip = "train.clip={kind: norm, max_norm: 0.5}"
    return {"faulty": deep, "control": (*deep, clip, FP32)}


def vanishing_gradients(family: Family, random: Random) -> Made:
    if family in ("residual", "transformer"):
        return "gradients go past the layers, on the residual connections"
    early = tuple(f"blocks.{number}.{INNER[family]}" for number in range(3))
    return {
        "faulty": ("task.depth=8", "task.norm=none", "task.activation=sigmoid"),
        "control": ("task.depth=8", FP32),
        "layers": ("stem", "stem.1", *early),
        "repair": (r"norm|residual|relu|activation|init", ("task.depth=8",)),
    }


def lost_updates(family: Family, random: Random) -> Made:
    small = (adam(lr=4e-4), "task.init=2", "train.steps=200")
    return {"faulty": (*small, "precision.mode=bf16-pure"), "control": (*small, FP32)}


def adam_eps(family: Family, random: Random) -> Made:
    if family in ("convnet", "transformer"):
        return {"faulty": (adam("adam", eps=1),), "control": (adam("adam"), FP32)}
    pure = (adam("adam"), "precision.mode=fp16-pure")
    return {"faulty": pure, "control": (adam("adam"), FP32)}


def attention_logits(family: Family, random: Random) -> Made:
    if family != "transformer":
        return "no attention"
    number = random.randrange(3)
    place = f"blocks.{number}.attention"
    return {
        "faulty": ("task.attention=300", f"task.block={number}"),
        "control": (FP32,),
        "layers": (place, *(f"{place}.{name}" for name in ("query", "key"))),
        "repair": (r"quer|key|logit|attention", ()),
    }


def norm_in_half(family: Family, random: Random) -> Made:
    if family in ("convnet", "mlp"):
        number = block(random)
        rms = ("task.norm=rms", f"task.block={number}", "task.init=1000")
        layers = (f"blocks.{number}.norm",)
    else:  # pixels of 12 bits, and norms of the model's own throughout
        rms = ("task.norm=rms", "task.largest_pixel=4095")
        layers = ("last_norm", *(f"blocks.{n}.norm{m}" for n in range(3) for m in ("", 1, 2)))
    return {"faulty": rms, "control": (*rms, FP32), "layers": layers}


def batchnorm_stats(family: Family, random: Random) -> Made:
    if family not in ("convnet", "residual"):
        return "no BatchNorm"
    names = ("norm",) if family == "convnet" else ("norm", "norm1")
    norms = (f"blocks.{number}.{name}" for number in range(3) for name in names)
    return {  # 1 - 0.999, the other meaning of `momentum`
        "faulty": ("task.momentum=0.001",),
        "control": (FP32,),
        "layers": ("last_norm", *norms),
        "repair": (r"momentum|statistic|running", ()),
    }


def half_reduction(family: Family, random: Random) -> Made:
    sums = ("task.decode=0.1",)
    return {
        "faulty": (*sums, "precision.mode=fp16-master"),
        "control": (*sums, FP32),
        "layers": ("loss",),
        "repair": (r"float|fp32", (*sums, "task.float_sums=true", "precision.mode=fp16-master")),
    }


def autocast_inactive(family: Family, random: Random) -> Made:
    loop = "wrong_device" if family in ("convnet", "transformer") else "outside_of_autocast"
    return {"loop": loop, "harm": "memory", "repair": (r"autocast|bf16|device", ())}


def fp32_island(family: Family, random: Random) -> Made:
    inner = tuple(f"blocks.{n}{part}" for n in range(3) for part in ("", f".{INNER[family]}"))
    return {
        "faulty": ('precision.sensitive_layers=["blocks.?"]',),
        "control": (),
        "layers": inner,
        "harm": "memory",
    }


def clip_before_unscale(family: Family, random: Random) -> Made:
    return {"loop": "clip_first", "repair": (r"unscale", ())}


def missing_unscale(family: Family, random: Random) -> Made:
    return {"loop": "plain_step", "repair": (r"unscale|scaler\.step", ())}


def accumulation(family: Family, random: Random) -> Made:
    if family == "mlp":
        return {"loop": "step_in_window", "repair": (r"once|window|micro|after", ())}
    return {"loop": "never_zeroed", "repair": (r"zero_grad", ())}


def bad_checkpoint(family: Family, random: Random) -> Made:
    number = random.randrange(3)
    layer = f"blocks.{number}.{INNER[family]}"

    def spoil(weight: Tensor) -> None:
        """A bit of the exponent, which makes infinity or NaN of it."""
        weight.view(-1)[weight.numel() // 2] = random.choice((math.nan, math.inf))

    return {
        "damage": Damage(f"{layer}.weight", spoil),
        "layers": (layer,),
        "control": (FP32,),
        "repair": (r"checkpoint|weights|file|load", ()),
    }


def bad_batch(family: Family, random: Random) -> Made:
    if family == "transformer":
        return {"loop": "damaged_batch_in_bf16", "repair": (r"batch|sample|data|finite", ())}
    what = "task.extreme=0.1" if family == "residual" else "task.missing=0.1"
    return {
        "faulty": (what,),
        "control": (FP32,),
        "repair": (r"batch|sample|data|input", ()),
    }


def nondeterminism(family: Family, random: Random) -> Made:
    number = random.randrange(3)
    noise = ("task.activation=noisy", f"task.block={number}")
    return {
        "faulty": (*noise, "task.own_generator=true"),
        "control": noise,
        "layers": (f"blocks.{number}.act",),
        "harm": "repeat",
        "repair": (r"seed|generator|random", noise),
    }


def out_of_memory(family: Family, random: Random) -> Made:
    gather = ("task.activation=gather", "task.most=9")
    return {"faulty": gather, "control": (*gather, "train.micro_batch_size=8", FP32)}


def learning_rate(family: Family, random: Random) -> Made:
    lr = {"convnet": "optim.lr=1e-4", "residual": "optim.lr=30", "transformer": "optim.lr=3",
          "mlp": "optim.lr=1e-5"}[family]  # fmt: skip
    return {"faulty": (lr, FP32), "control": (FP32,)}


def weights_exceed_fp16(family: Family, random: Random) -> Made:
    number = block(random)
    layer = f"blocks.{number}.{INNER[family]}"

    def spoil(weight: Tensor) -> None:
        """As of a model trained in bf16: the norm that follows takes the factor out again."""
        weight.mul_(2e5 / weight.abs().max())

    return {
        "damage": Damage(f"{layer}.weight", spoil),
        "layers": (layer,),
        "control": (FP32,),
    }


def optimizer_state_corrupted(family: Family, random: Random) -> Made:
    loop = "fused_first_skip" if family in ("convnet", "transformer") else "moment_before_check"
    return {"loop": loop, "repair": (r"fused|skip|state|GradScaler|scaler", ())}


FAULTS: dict[FindingId, tuple[tuple[Phase, ...], Callable[[Family, Random], Made]]] = {
    "underflow": (("backward",), underflow),
    "forward-overflow": (("forward",), forward_overflow),
    "scale-too-high": (("backward",), scale_too_high),
    "scale-collapse": (("forward",), scale_collapse),
    "backward-nonfinite": (("backward",), backward_nonfinite),
    "skip-storm": (("backward", "update"), skip_storm),
    "exploding-gradients": (("backward",), exploding_gradients),
    "vanishing-gradients": (("backward",), vanishing_gradients),
    "lost-updates": (("update",), lost_updates),
    "adam-eps": (("update",), adam_eps),
    "attention-logits": (("forward",), attention_logits),
    "norm-in-half": (("forward",), norm_in_half),
    "batchnorm-stats": (("forward",), batchnorm_stats),
    "half-reduction": (("forward",), half_reduction),
    "autocast-inactive": (("forward",), autocast_inactive),
    "fp32-island": (("forward",), fp32_island),
    "clip-before-unscale": (("update", "backward"), clip_before_unscale),
    "missing-unscale": (("update",), missing_unscale),
    "accumulation": (("update", "backward"), accumulation),
    "bad-checkpoint": (("input", "forward"), bad_checkpoint),
    "bad-batch": (("input",), bad_batch),
    "nondeterminism": (("forward",), nondeterminism),
    "out-of-memory": (("forward",), out_of_memory),
    "learning-rate": (("update",), learning_rate),
    "weights-exceed-fp16": (("forward",), weights_exceed_fp16),
    "optimizer-state-corrupted": (("update",), optimizer_state_corrupted),
}
