"""Each row of the mode table, by the types that tensors really have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.engines.local import LocalEngine
from mpcli.precision.numerics import numeric_settings
from mpcli.recipe.precision import Mode, Precision
from tests.engines.test_local import make_batch, make_engine, make_loss, make_net
from tests.small import small_recipe

DEVICE = torch.device("cpu")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class SmallTransformer(nn.Module):
    """Rows of an 8x8 image as tokens, with a softmax of its own beside the fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.layer(self.embed(images.flatten(1, 2)))
        shares = torch.softmax(tokens.mean(2), 1)
        logits: Tensor = self.head((shares[:, :, None] * tokens).sum(1))
        return logits


def make_transformer() -> nn.Module:
    torch.manual_seed(0)
    return SmallTransformer()


MODELS = {"convnet": make_net, "transformer": make_transformer}


@dataclass(frozen=True)
class Row:
    """Types as the mode table has them."""

    weights: torch.dtype
    norm_weights: torch.dtype
    compute: torch.dtype  # of convolutions, matrix products and attention
    gradients: torch.dtype
    masters: torch.dtype | None  # None: the weights are stepped
    state: torch.dtype  # of the optimizer
    batch_norm: torch.dtype
    layer_norm: torch.dtype
    softmax: torch.dtype


TABLE: dict[Mode, Row] = {
    "fp32": Row(FP32, FP32, FP32, FP32, None, FP32, FP32, FP32, FP32),
    "tf32": Row(FP32, FP32, FP32, FP32, None, FP32, FP32, FP32, FP32),
    "fp16": Row(FP32, FP32, FP16, FP32, None, FP32, FP16, FP32, FP32),
    "bf16": Row(FP32, FP32, BF16, FP32, None, FP32, BF16, FP32, FP32),
    "fp16-master": Row(FP16, FP32, FP16, FP16, FP32, FP32, FP32, FP32, FP16),
    "bf16-master": Row(BF16, FP32, BF16, BF16, FP32, FP32, FP32, FP32, BF16),
    "fp16-pure": Row(FP16, FP16, FP16, FP16, None, FP16, FP16, FP16, FP16),
    "bf16-pure": Row(BF16, BF16, BF16, BF16, None, BF16, BF16, BF16, BF16),
}
NAMES = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}


NORMS = (nn.BatchNorm2d, nn.LayerNorm)

OPTIMIZERS = ["{kind: sgd, lr: 0.1, momentum: 0.9}", "{kind: adamw, lr: 0.01}"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", TABLE)
def test_the_types_of_a_mode(tmp_path: Path, mode: Mode, model: str, optimizer: str) -> None:
    row = TABLE[mode]
    settings = (f"precision.mode={mode}", f"optim={optimizer}", "train.ema=0.9")
    engine = make_engine(tmp_path, *settings, model=MODELS[model]())
    norms = {n for n, m in engine.model.named_modules() if isinstance(m, NORMS)}
    owner = {n: n.rpartition(".")[0] for n, _ in engine.model.named_parameters()}
    activations: dict[str, torch.dtype] = {}
    gradients: dict[str, torch.dtype] = {}
    for name, module in engine.model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: activations.update({name: type_of(output)})
        )
    for name, parameter in engine.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.update({name: p.grad.dtype})
        )
    with numeric_settings(recipe_of(tmp_path, mode), DEVICE):
        for last in (False, True):
            loss = engine.accumulate(make_loss(), make_batch(), 16, last=last)
        kept = [m.grad.dtype for m in engine.masters if m.grad is not None]
        engine.step()
    assert loss.dtype == FP32

    for name, parameter in engine.model.named_parameters():
        in_norm = owner[name] in norms
        assert parameter.dtype == (row.norm_weights if in_norm else row.weights), name
        assert gradients[name] == (row.norm_weights if in_norm else row.gradients), name
    for name, buffer in engine.model.named_buffers():
        if buffer.is_floating_point():  # BatchNorm's statistics
            assert buffer.dtype == row.norm_weights, name
    for name, module in engine.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            # The projections inside an attention are computed by the attention.
            computed = engine.observed[name].computed
            assert (name, computed) in [
                (name, NAMES[row.compute]),
                ("layer.self_attn.out_proj", "-"),
            ]
            if name in activations and not name.endswith("self_attn"):
                assert (name, activations[name]) == (name, row.compute)
        if isinstance(module, nn.BatchNorm2d):
            assert engine.observed[name].computed == NAMES[row.batch_norm]
        if isinstance(module, nn.LayerNorm):
            assert engine.observed[name].computed == NAMES[row.layer_norm]
    if model == "transformer":
        assert NAMES[row.softmax] in engine.observed[""].computed
    assert engine.observed["loss"].computed == "fp32"

    masters = [m for p, m in zip(engine.parameters, engine.masters, strict=True) if m is not p]
    if row.masters:
        assert len(masters) == sum(owner[n] not in norms for n, _ in named(engine))
        assert {m.dtype for m in masters} == {row.masters}
        assert set(kept) == {FP32}  # half gradients were added up in fp32
    else:
        assert masters == []
    for (name, _), master in zip(named(engine), engine.masters, strict=True):
        state = engine.optimizer.state[master]
        kinds = {value.dtype for key, value in state.items() if key != "step"}
        assert kinds == {
            row.state if owner[name] not in norms else FP32 if row.masters else row.state
        }
    assert {average.dtype for average in engine.average} == {FP32}


def named(engine: LocalEngine) -> list[tuple[str, nn.Parameter]]:
    return list(engine.model.named_parameters())


def type_of(output: object) -> torch.dtype:
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first.dtype


def recipe_of(tmp_path: Path, mode: str) -> Precision:
    return small_recipe(tmp_path, f"precision.mode={mode}").recipe.precision


@pytest.mark.parametrize("clip", ["null", "{kind: norm, max_norm: 0.5}"])
@pytest.mark.parametrize("mode", ["fp16-master", "bf16-master"])
def test_master_modes_are_a_loop_by_hand(tmp_path: Path, mode: Mode, clip: str) -> None:
    """Half model, fp32 masters that begin unrounded, micro-batches added up in fp32."""
    settings = (f"precision={{mode: {mode}, loss_scale: {{kind: static, scale: 256}}}}",)
    sgd = "optim={kind: sgd, lr: 0.1, momentum: 0.9}"
    engine = make_engine(tmp_path, *settings, sgd, f"train.clip={clip}")

    half = TABLE[mode].weights
    model = make_net()
    masters = [p.detach().clone() for p in model.parameters()]
    norm = model[1]  # type: ignore[index]
    for module in model.children():
        if module is not norm:
            module.to(half)
    norm_forward = norm.forward
    norm.forward = lambda x: norm_forward(x.float()).to(half)
    optimizer = torch.optim.SGD(masters, lr=0.1, momentum=0.9, fused=True)
    for step in range(10):
        batches = [make_batch(2 * step), make_batch(2 * step + 1)]
        sums = [torch.zeros_like(master) for master in masters]
        for last, batch in enumerate(batches):
            engine.accumulate(make_loss(), batch, 16, last=bool(last))
            loss, _ = make_loss()(
                model, Batch({**batch.tensors, "inputs": batch["inputs"].to(half)})
            )
            loss.backward(torch.tensor(256.0) / 16)
            for total, p in zip(sums, model.parameters(), strict=True):
                assert p.grad is not None
                total += p.grad.float()
                p.grad = None
        for master, total in zip(masters, sums, strict=True):
            master.grad = total / 256
        if clip != "null":
            torch.nn.utils.clip_grad_norm_(masters, 0.5)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
        assert engine.step().found_inf == 0
    for ours, theirs in zip(engine.masters, masters, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5)
    for p, master in zip(engine.parameters, engine.masters, strict=True):
        assert torch.equal(p, master.to(p.dtype))


@pytest.mark.parametrize("mode", ["fp32", "tf32", "fp16", "bf16-pure"])
def test_tf32_is_on_in_its_mode_alone(mode: Mode) -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    with numeric_settings(Precision(mode=mode), DEVICE):
        assert [switch.allow_tf32 for switch in switches] == [mode == "tf32"] * 2
    assert [switch.allow_tf32 for switch in switches] == before
