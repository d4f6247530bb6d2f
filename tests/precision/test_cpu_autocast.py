"""Autocast on the CPU has CUDA's policy while asked to, and torch's own before and after."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpcli.precision.cpu_autocast import (
    FP32,
    FP32_SET_OPT_DTYPE,
    LOWER_PRECISION_FP,
    PROMOTE,
    cuda_autocast_policy,
)

HALF = (torch.float16, torch.bfloat16)
half_types = pytest.mark.parametrize("half", HALF, ids=["fp16", "bf16"])


def cudas_lists() -> dict[str, list[str]]:
    """The lists in the header of the installed torch: policy -> operators."""
    header = (Path(torch.__path__[0]) / "include/ATen/autocast_mode.h").read_text()
    macros = dict(re.findall(r"#define AT_FORALL_(\w+)\(_\)((?:.*\\\n)+.*)", header))
    appended = re.findall(r'"([\w.]+)"', macros.pop("DIFFERENT_REDISPATCH_SIGNATURE"))
    lists = {
        policy: [name.replace(", ", ".") for name in re.findall(r"_\((\w[\w, ]*)\)", macro)]
        for policy, macro in macros.items()
    }
    return {**lists, "FP32": lists["FP32"] + appended}


CUDAS = cudas_lists()
RNNS = {f"{kind}.{form}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for form in ("input", "data")}  # fmt: skip
WITHOUT_CPU_KERNELS = {
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "_scaled_dot_product_flash_attention",
}

# Arguments of an operator, made from a tensor of shape (4, 6) with values from 0.1 to 0.9.
Arguments = Callable[[Tensor], tuple[Any, ...]]


def same(names: str, arguments: Arguments) -> dict[str, Arguments]:
    return dict.fromkeys(names.split(), arguments)


CLASSES = torch.tensor([1, 0, 2, 1])
ARGUMENTS: dict[str, Arguments] = {
    **same("exp expm1 log log10 log2 log1p softplus reciprocal rsqrt acos asin tan cosh sinh "
           "erfinv norm.Scalar nuclear_norm pdist prod sum linalg_vector_norm", lambda x: (x,)),
    **same("linalg_matrix_norm", lambda x: (x, 1)),
    **same("linalg_matrix_norm.str_ord", lambda x: (x, "fro")),
    **same("softmax.int log_softmax.int cumsum cumprod prod.dim_int", lambda x: (x, 1)),
    **same("sum.dim_IntList logsumexp frobenius_norm.dim", lambda x: (x, [1])),
    **same("nuclear_norm.dim", lambda x: (x, [0, 1])),
    **same("norm.ScalarOpt_dim", lambda x: (x, 3, [1])),
    **same("renorm", lambda x: (x, 2, 0, 0.5)),
    **same("pow.Tensor_Scalar", lambda x: (x, 2.5)),
    **same("pow.Tensor_Tensor", lambda x: (x, x)),
    **same("pow.Scalar", lambda x: (2.5, x)),
    **same("layer_norm", lambda x: (x, [6], x[0], x[1])),
    **same("native_layer_norm", lambda x: (x, [6], x[0], x[1], 1e-5)),
    **same("rms_norm", lambda x: (x, [6], x[0])),
    **same("group_norm", lambda x: (x, 2, x[0], x[1])),
    **same("l1_loss smooth_l1_loss huber_loss mse_loss kl_div binary_cross_entropy_with_logits "
           "dist cdist cosine_similarity", lambda x: (x[:2], x[2:])),
    **same("soft_margin_loss hinge_embedding_loss", lambda x: (x[:2].T, torch.tensor([1, -1]))),
    **same("poisson_nll_loss", lambda x: (x[:2], x[2:], True, False, 1e-8, 1)),
    **same("nll_loss multi_margin_loss", lambda x: (x, CLASSES)),
    **same("nll_loss2d", lambda x: (x.view(2, 3, 2, 2), torch.ones(2, 2, 2).long())),
    **same("multilabel_margin_loss", lambda x: (x, torch.tensor([[1, 0, -1, 0, 0, 0]] * 4))),
    **same("margin_ranking_loss triplet_margin_loss", lambda x: (x[:2], x[1:3], x[2:])),
    **same("cosine_embedding_loss", lambda x: (x[:2], x[2:], torch.tensor([1, -1]))),
    **same("upsample_nearest1d _upsample_nearest_exact1d", lambda x: (x[None], [9])),
    **same("upsample_nearest2d _upsample_nearest_exact2d", lambda x: (x[None, None], [9, 9])),
    **same("upsample_nearest3d _upsample_nearest_exact3d",
           lambda x: (x[None, None, None], [2, 9, 9])),
    **same("upsample_linear1d", lambda x: (x[None], [9], False)),
    **same("upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
           lambda x: (x[None, None], [9, 9], False)),
    **same("upsample_trilinear3d", lambda x: (x[None, None, None], [2, 9, 9], False)),
}  # fmt: skip

CONVOLUTION = ([1], [0], [1], False, [0], 1)  # stride, padding, dilation, transposed ...
HALF_ARGUMENTS: dict[str, Arguments] = {
    **same("convolution", lambda x: (x[None], x[None, :, :3], None, *CONVOLUTION)),
    **same("_convolution",
           lambda x: (x[None], x[None, :, :3], None, *CONVOLUTION, False, False, True, True)),
    **same("mv", lambda x: (x, x[0])),
    **same("addmv", lambda x: (x[:, 0], x, x[0])),
    **same("addr", lambda x: (x, x[:, 0], x[0])),
    **same("einsum", lambda x: ("ij,kj->ik", [x, x])),
    **same("chain_matmul linalg_multi_dot", lambda x: ([x, x.T, x],)),
    **same("rnn_tanh_cell rnn_relu_cell", lambda x: (x, x, *[x.repeat(2, 1)[:6]] * 2)),
    **same("gru_cell", lambda x: (x, x, *[x.repeat(5, 1)[:18]] * 2)),
    **same("lstm_cell", lambda x: (x, [x, x], *[x.repeat(6, 1)] * 2)),
}  # fmt: skip

# The second tensor has another type than the first.
Mixed = Callable[[Tensor, Tensor], tuple[Any, ...]]
PROMOTED: dict[str, Mixed] = {
    **dict.fromkeys(["addcdiv", "addcmul"], lambda x, y: (x, y, x)),
    "atan2": lambda x, y: (x, y),
    "bilinear": lambda x, y: (x, y, x[None].repeat(1, 2, 1)[:, :6, :6], None),
    "cross": lambda x, y: (x[:3], y[:3], 0),
    **dict.fromkeys(["dot", "vdot"], lambda x, y: (x[0], y[0])),
    "tensordot": lambda x, y: (x, y, [1], [1]),
    "index_put": lambda x, y: (x, [torch.tensor([0])], y[:1]),
    "scatter_add": lambda x, y: (x, 0, torch.zeros(4, 6).long(), y),
    "grid_sampler": lambda x, y: (x[None, None], y.view(1, 3, 4, 2), 0, 0, False),
}


def call(name: str, arguments: Iterable[Any]) -> Tensor:
    packet, _, overload = name.partition(".")
    result = getattr(getattr(torch.ops.aten, packet), overload or "default")(*arguments)
    return result if isinstance(result, Tensor) else result[0]


def leaves(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments with their floating-point tensors as leaves of `dtype`."""
    return tuple(
        value.detach().to(dtype, copy=True).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in arguments
    )


def values(dtype: torch.dtype) -> Tensor:
    values = torch.linspace(0.1, 0.9, 24)[torch.randperm(24, generator=torch.manual_seed(0))]
    return values.view(4, 6).to(dtype)


class Types(TorchDispatchMode):
    """Notes the first result's type of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result)[:1]:
            if isinstance(leaf, Tensor):
                self.of.setdefault(function.overloadpacket.__name__, set()).add(leaf.dtype)
        return result


@half_types
@pytest.mark.parametrize("name", CUDAS["FP32"] + CUDAS["FP32_SET_OPT_DTYPE"])
def test_computes_in_fp32_what_cuda_does(name: str, half: torch.dtype) -> None:
    inputs = leaves(ARGUMENTS[name](values(half)), half)
    with Types() as seen:
        with cuda_autocast_policy(), torch.amp.autocast("cpu", half):
            result = call(name, inputs)
        result.sum().backward()
    wide = leaves(inputs, torch.float32)
    expected = call(name, wide)
    expected.sum().backward()
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    for one, other in zip(inputs, wide, strict=True):
        if isinstance(one, Tensor) and one.requires_grad:
            assert torch.equal(one.grad, other.grad.to(half))
    assert all(seen.of[op] == {torch.float32} for op in seen.of if "backward" in op)


@half_types
@pytest.mark.parametrize("name", sorted(set(CUDAS["LOWER_PRECISION_FP"]) & {*HALF_ARGUMENTS}))
def test_computes_in_half_what_cuda_does(name: str, half: torch.dtype) -> None:
    with cuda_autocast_policy(), torch.amp.autocast("cpu", half):
        result = call(name, HALF_ARGUMENTS[name](values(torch.float32)))
    expected = call(name, HALF_ARGUMENTS[name](values(half)))
    assert result.dtype == half
    torch.testing.assert_close(result, expected)


@half_types
@pytest.mark.parametrize("half_first", [True, False])
@pytest.mark.parametrize("name", CUDAS["PROMOTE"])
def test_operands_of_two_types_meet_in_fp32(name: str, half_first: bool, half: torch.dtype) -> None:
    types = (half, torch.float32) if half_first else (torch.float32, half)
    one, other = map(values, types)
    with cuda_autocast_policy(), torch.amp.autocast("cpu", half):
        result = call(name, PROMOTED[name](one, other))
    expected = call(name, PROMOTED[name](one.float(), other.float()))
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@half_types
@pytest.mark.parametrize("name", PROMOTE)
def test_operands_of_one_type_keep_it(name: str, half: torch.dtype) -> None:
    x = values(half)
    with cuda_autocast_policy(), torch.amp.autocast("cpu", half):
        assert call(name, PROMOTED[name](x, x)).dtype == half


def test_every_operator_of_cudas_lists_has_its_policy() -> None:
    """A torch that adds an operator, or gives the CPU another policy, fails here or above."""
    lists = {
        "LOWER_PRECISION_FP": LOWER_PRECISION_FP,
        "FP32": FP32,
        "FP32_SET_OPT_DTYPE": FP32_SET_OPT_DTYPE,
        "PROMOTE": PROMOTE,
    }
    assert set(lists) <= set(CUDAS)
    for policy, names in lists.items():
        assert len(set(names)) == len(names)
        missing = {name for name in CUDAS[policy] if name not in names and not has_kernel(name)}
        assert missing - WITHOUT_CPU_KERNELS == set(), policy
        assert set(names) - set(CUDAS[policy]) - RNNS == set(), policy


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU")


@half_types
@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [True, False])
def test_recurrent_layers_compute_in_half(
    rnn: type[nn.RNNBase], packed: bool, half: torch.dtype
) -> None:
    layer = rnn(6, 6, num_layers=2, bidirectional=True, batch_first=True)
    inputs = values(torch.float32).view(2, 2, 6).requires_grad_()
    given = nn.utils.rnn.pack_padded_sequence(inputs, [2, 1], batch_first=True)
    with cuda_autocast_policy(), torch.amp.autocast("cpu", half):
        outputs, hidden = layer(given if packed else inputs)
    outputs = outputs.data if packed else outputs
    assert {leaf.dtype for leaf in tree_leaves((outputs, hidden))} == {half}
    outputs.float().sum().backward()
    assert inputs.grad is not None and inputs.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    wide, _ = layer(given if packed else inputs)
    torch.testing.assert_close(outputs.float(), wide.data if packed else wide, atol=0.02, rtol=0)


def test_the_callers_dtype_wins() -> None:
    x = values(torch.float16)
    with cuda_autocast_policy(), torch.amp.autocast("cpu", torch.float16):
        for dtype in (torch.float16, torch.float32, torch.float64):
            assert torch.softmax(x, 1, dtype=dtype).dtype == dtype
            assert x.sum(dtype=dtype).dtype == dtype
            assert x.cumsum(0, dtype=dtype).dtype == dtype
            assert torch.linalg.vector_norm(x, dtype=dtype).dtype == dtype
        assert torch.equal(torch.softmax(x, 1, dtype=torch.float16), F.softmax(x.half(), 1).half())


def test_fp64_integers_and_other_regions_are_left_alone() -> None:
    with cuda_autocast_policy():
        assert values(torch.float16).exp().dtype == torch.float16
        with torch.amp.autocast("cpu", torch.float16):
            assert values(torch.float64).exp().dtype == torch.float64
            assert torch.ones(3, dtype=torch.int32).sum().dtype == torch.int64
            with torch.amp.autocast("cpu", enabled=False):
                assert values(torch.float16).exp().dtype == torch.float16


def types_of_all(half: torch.dtype) -> dict[str, torch.dtype | None]:
    """Type of each operator's result under autocast; None where it fails."""
    types: dict[str, torch.dtype | None] = {}
    with torch.amp.autocast("cpu", half):
        for name, arguments in {**ARGUMENTS, **HALF_ARGUMENTS}.items():
            dtype = half if name in ARGUMENTS else torch.float32
            types[name] = None
            with contextlib.suppress(RuntimeError):
                types[name] = call(name, arguments(values(dtype))).dtype
    return types


AS_ON_CUDA = dict.fromkeys(ARGUMENTS, torch.float32) | dict.fromkeys(HALF_ARGUMENTS, torch.float16)


def test_torchs_own_policy_is_back_afterwards() -> None:
    before = types_of_all(torch.float16)
    with cuda_autocast_policy():
        assert types_of_all(torch.float16) == AS_ON_CUDA
    assert types_of_all(torch.float16) == before
    assert before["softmax.int"] == before["layer_norm"] == before["pow.Scalar"] == torch.float16
    with pytest.raises(ValueError, match="inside"), cuda_autocast_policy():
        raise ValueError("inside")
    assert types_of_all(torch.float16) == before


def test_it_can_be_entered_within_itself() -> None:
    before = types_of_all(torch.float16)
    with cuda_autocast_policy():
        with cuda_autocast_policy():
            pass
        with pytest.raises(ValueError, match="inner"), cuda_autocast_policy():
            raise ValueError("inner")
        assert types_of_all(torch.float16) == AS_ON_CUDA
    assert types_of_all(torch.float16) == before


def test_nothing_is_printed_or_overridden(capfd: pytest.CaptureFixture[str]) -> None:
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with cuda_autocast_policy():
                pass
    finally:
        torch.set_warn_always(always)
    assert capfd.readouterr() == ("", "")


class Attention(nn.Module):
    """Self-attention with the softmax written out; (B, T, 8) -> (B, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 8**0.5, dim=-1)
        return x + self.out(torch.bmm(weights, v))


def small_transformer() -> nn.Sequential:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Conv1d(5, 5, 1), encoder, Attention(), nn.LayerNorm(8))


@half_types
def test_a_transformer_has_softmax_and_norms_in_fp32_and_products_in_half(
    half: torch.dtype,
) -> None:
    model = small_transformer()
    with Types() as forward, cuda_autocast_policy(), torch.amp.autocast("cpu", half):
        outputs = model(torch.randn(2, 5, 8))
    with Types() as backward:
        outputs.square().mean().backward()
    for name in ("_softmax", "native_layer_norm"):
        assert forward.of[name] == {torch.float32}
        assert backward.of[f"{name}_backward_data" if name == "_softmax" else f"{name}_backward"]
    for name in (
        "addmm",
        "mm",
        "bmm",
        "convolution",
        "_scaled_dot_product_flash_attention_for_cpu",
    ):
        assert forward.of[name] == {half}, name
    assert backward.of["_softmax_backward_data"] == {torch.float32}
    assert backward.of["native_layer_norm_backward"] == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_fake_tensors_show_the_same_types() -> None:
    with FakeTensorMode(), cuda_autocast_policy(), torch.amp.autocast("cpu", torch.float16):
        x = torch.empty(4, 6, dtype=torch.float16)
        assert torch.softmax(x, 1).dtype == torch.float32
        assert x.sum().dtype == torch.float32
        assert torch.mv(x.float(), x[0]).dtype == torch.float16


@pytest.mark.slow
@half_types
def test_compiled_models_have_the_policy_they_were_compiled_under(half: torch.dtype) -> None:
    """What the caches on disk hold of the same model without the policy is not taken, nor back."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)), torch.randn(4, 8)

    def run(model: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        weight.grad = None
        with torch.amp.autocast("cpu", half):
            outputs = model(x)
        outputs.float().square().sum().backward()
        assert weight.grad is not None
        return outputs, weight.grad

    def compiled() -> tuple[Tensor, Tensor]:
        torch._dynamo.reset()
        return run(torch.compile(model))

    weight = model[0].weight
    assert compiled()[0].dtype == half
    with cuda_autocast_policy():
        outputs, gradient = compiled()
        expected = run(model)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close((outputs, gradient), expected, atol=1e-3, rtol=1e-2)
    assert compiled()[0].dtype == half
