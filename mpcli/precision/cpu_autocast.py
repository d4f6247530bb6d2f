"""CUDA's autocast policy for autocast on the CPU, so that a mode means the same on both.

torch's own policy for the CPU keeps softmax, norms, exponentials, powers and sums in half
precision, and fails where CUDA accepts operands of different types.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpcli.precision.kernels import Kernel, dispatcher_kernels

# Names of operators as in ATen/autocast_mode.h, which has the policies in macros of these names.
# An operator whose kernels are for CUDA alone is left out, as are those for which the CPU's own
# policy is the same.
LOWER_PRECISION_FP = (
    *("_convolution", "convolution"),
    *("mv", "addmv", "addr", "einsum", "chain_matmul", "linalg_multi_dot"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    # CUDA casts these in ATen/cudnn/AutocastRNN.cpp. The CPU's LSTM casts fp32 inputs only after it
    # has chosen oneDNN for them, which fails on a processor without instructions for the half type.
    *("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input"),
    *("lstm.data", "gru.data", "rnn_tanh.data", "rnn_relu.data"),
)
FP32 = (
    *("exp", "expm1", "log", "log10", "log2", "log1p", "logsumexp", "softplus"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "reciprocal", "rsqrt"),
    *("acos", "asin", "tan", "cosh", "sinh", "erfinv"),
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm"),
    *("norm.Scalar", "norm.ScalarOpt_dim", "frobenius_norm.dim"),
    *("nuclear_norm", "nuclear_norm.dim", "renorm"),
    *("cosine_similarity", "dist", "pdist"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
FP32_SET_OPT_DTYPE = (
    *("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "cumprod"),
    *("linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord"),
)
PROMOTE = (
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "tensordot"),
    *("index_put", "scatter_add"),
)

_AUTOCAST = torch._C.DispatchKey.AutocastCPU
_AUTOCAST_KEYS = torch._C.DispatchKeySet(_AUTOCAST)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def cuda_autocast_policy() -> Iterator[None]:
    """Give autocast on the CPU the policy that it has on CUDA, in the whole process.

    Within `torch.amp.autocast("cpu")` an operator of CUDA's fp32 lists then computes in fp32 from
    half inputs and returns fp32, backward too; `dtype=` given by the caller wins. Mixed operands
    of CUDA's promote list meet in the widest type, and the rest of its list of half-precision
    operators takes half inputs. fp64 inputs and integers stay as they are. What the CPU's own
    policy computes in fp32 beyond CUDA's (3d pooling, padding, grid_sampler, FFT ...) stays so.

    Without autocast it changes nothing. Entered within itself it finds its kernels in place and
    adds none. A model that torch.compile compiled outside keeps the policy it was compiled with.

    Source: docs.pytorch.org/docs/stable/amp.html, "Autocast Op Reference"; torch's own lists
    are in ATen/autocast_mode.h.
    """
    with dispatcher_kernels(_kernels(), "AutocastCPU", "cuda-autocast-policy"):
        yield


def _kernels() -> Iterator[tuple[str, Kernel]]:
    """The kernels that this version of torch lacks, of operators that it has."""
    for names, make_kernel in (
        (LOWER_PRECISION_FP, _half_kernel),
        (FP32 + FP32_SET_OPT_DTYPE, _fp32_kernel),
        (PROMOTE, _promoting_kernel),
    ):
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if operator and not operator.has_kernel_for_dispatch_key(_AUTOCAST):
                yield name, make_kernel(operator)


def _half_kernel(operator: Kernel) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return operator(*map(_to_half, args), **kwargs)

    return kernel


def _fp32_kernel(operator: Kernel) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            if "dtype" in kwargs:  # vector_norm refuses one narrower than its input's
                return operator(*args, **kwargs)
            return operator(*map(_to_fp32, args), **kwargs)

    return kernel


def _promoting_kernel(operator: Kernel) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            mixed = len({value.dtype for value in args if _is_eligible(value)}) > 1
            return operator(*(map(_to_fp32, args) if mixed else args), **kwargs)

    return kernel


def _to_half(value: Any) -> Any:
    if isinstance(value, list):  # operands of einsum, weights of LSTM
        return [_to_half(item) for item in value]
    return value.to(torch.get_autocast_dtype("cpu")) if _is_eligible(value) else value


def _to_fp32(value: Any) -> Any:
    return value.float() if _is_eligible(value) else value


def _is_eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _FLOATS and value.is_cpu
