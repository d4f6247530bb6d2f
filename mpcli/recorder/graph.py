"""What the graph of a loss tells: whether it was scaled, and whose parameters it leads to."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node


@dataclass
class Scaled:
    """What `scaler.scale` returned, which is not kept alive here, and what it was given."""

    scaled: weakref.ref[Tensor]
    plain: Tensor
    used: bool = False  # by a backward

    def is_behind(self, root: Tensor) -> bool:
        """Whether the root was computed from it: what is gone was used for the next one."""
        scaled = self.scaled()
        return not self.used if scaled is None else _comes_from(root, scaled)

    @property
    def is_over(self) -> bool:
        return self.used and self.scaled() is None


def _comes_from(root: Tensor, other: Tensor) -> bool:
    """Whether a tensor was computed from another one, which is near in general."""
    return any(node is other.grad_fn for node in _graph(root)) if other.grad_fn else False


def reaches(roots: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether a backward leads to any of these, whatever became of the gradients there."""
    wanted = {id(parameter) for parameter in parameters}
    return any(
        id(getattr(node, "variable", None)) in wanted for root in roots for node in _graph(root)
    )


def _graph(root: Tensor) -> Iterator[Node]:
    """The nodes of a tensor's graph, the nearest first."""
    waiting = deque([root.grad_fn] if root.grad_fn else [])
    seen = set(waiting)
    while waiting:
        node = waiting.popleft()
        yield node
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)
