"""Numbers of a sweep as people read them."""

from __future__ import annotations

import math


def number_text(value: float) -> str:
    """All of its digits, and no more."""
    return f"{value:.0f}" if value.is_integer() and value < 2**53 else repr(value)


def power_text(scale: float) -> str:
    """`2^16`; what is no power of two as a number."""
    power = math.log2(scale)
    return f"2^{power:.0f}" if power.is_integer() else f"{scale:.10g}"


def share_text(share: float) -> str:
    """In percent, at most 6 characters; what is small is not called zero."""
    if not share:
        return "0"
    return f"{share:.1%}" if share >= 5e-4 else "<0.1%"
