"""Number formats and their short names."""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a floating-point type: `fp32`, `fp16`, `bf16`."""
    names = {known: name for name, known in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))
