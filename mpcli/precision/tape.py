"""The random numbers of one pass, in another whose types differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS = frozenset((
    *("bernoulli", "bernoulli_", "native_dropout", "rand", "rand_like", "uniform_"),
    *("randn", "randn_like", "normal", "normal_", "log_normal_", "cauchy_"),
    *("exponential_", "geometric_", "poisson", "multinomial"),
    *("randint", "randint_like", "random_", "randperm"),
))  # fmt: skip
"""Operations whose result (the mask, of a dropout) is what was drawn."""


class RandomTape(TorchDispatchMode):
    """Keeps what a model draws while it is entered, or gives back what another tape has kept.

    From one seed, torch draws other numbers in half precision than in fp32 (the masks of dropout
    are the same on a CPU, `randn` and `rand` are not), so two precisions can be compared only if
    one takes the draws of the other. What a fused attention draws inside its kernel is beyond
    reach.

    Args:
        draws: of a tape, to be given back in their order; None: keep one's own.

    Attributes:
        draws: results, in order, as they were drawn.
        matched: whether all draws asked for were those of the tape: the same operations on the
            same shapes. From the first other one on, numbers are drawn anew.
    """

    def __init__(self, draws: Sequence[tuple[str, Tensor]] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = list(draws or ())
        self.matched = True
        self._giving = None if draws is None else iter(draws)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        if name in DRAWS:
            is_dropout = name == "native_dropout"
            drawn = result[1] if is_dropout else result
            if self._giving is None:
                self.draws.append((name, drawn.clone()))
            elif self._give_back(name, drawn) and is_dropout:
                result[0].copy_(args[0] * drawn / (1.0 - args[1]))
        return result

    def _give_back(self, name: str, drawn: Tensor) -> bool:
        assert self._giving is not None
        known, values = next(self._giving, (None, drawn))
        self.matched = self.matched and (known, values.shape) == (name, drawn.shape)
        if self.matched:
            drawn.copy_(values)
        return self.matched
