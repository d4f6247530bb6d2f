"""A module beside itself in fp32, from its own input and its own output gradient.

A loop that is not ours cannot be run again. But one call of one of torch's modules can: in fp32, on
the input that it got, and backward from the gradient that it got. What differs is what the number
format did in this module alone: which products it flushed to zero or rounded to infinity. Errors
that it inherited from the modules before it are in both.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mpcli.precision.probe import MAX_CALLS, probed_modules
from mpcli.precision.statistics import Key, Samples, sampled

logger = logging.getLogger(__name__)

Guard = Callable[[Callable[..., None]], Callable[..., None]]

_RANDOM = (
    *(nn.modules.dropout._DropoutNd, nn.RReLU),
    *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
)
_CASTS = ("ToCopyBackward0", "ToBackward0")  # autocast makes one of a weight, for all of its uses


class LocalShadows:
    """Adds activations and their gradients to the samples of a step, each beside its shadow.

    Shadows have the modules of `torch.nn` without children and without random numbers, whose
    output is one tensor, where anything is not fp32. Those of a parameter's gradient are added up
    over its uses and kept as samples, for whoever adds the gradient once it is whole.

    Args:
        samples: of this step, begun.
        scale: that the loss is multiplied by, where it is.
        guard: makes a hook of a function, which must not fail in a loop that is not ours.

    Attributes:
        saw_fp16: whether any output, or gradient of one, was fp16.
    """

    def __init__(
        self, model: nn.Module, samples: Samples, scale: Tensor | float, guard: Guard
    ) -> None:
        self.saw_fp16 = False
        self._names = {module: name for name, module in probed_modules(model).items()}
        self._gradients: dict[int, Tensor] | None = None  # sampled, by id of the parameter
        self._samples = samples
        self._scaled = False
        self._scale = torch.as_tensor(scale).clone()
        self._guard = guard
        self._is_shadowed: Counter[int] = Counter()  # by id of the parameter
        self._uses: Counter[int] = Counter()
        self._calls: Counter[nn.Module] = Counter()
        self._seen_gradients: set[Key] = set()
        self._in_backward = False
        self._handles: list[RemovableHandle] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the modules in the block."""
        after = self._guard(_aside(self._after_forward))
        self._handles = [
            module.register_forward_hook(after, with_kwargs=True) for module in self._names
        ]
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def before_backward(
        self, roots: Sequence[Tensor], parameters: Iterable[Tensor], *, scaled: bool
    ) -> None:
        """Before each backward of the step: note how its graph uses the parameters.

        Args:
            roots: that the backward begins at.
            parameters: of the model. What is in their gradients before the first backward will
                be in them in the end.
            scaled: whether the roots are multiplied by the scale.
        """
        self._scaled, self._in_backward = scaled, True
        if self._gradients is None:
            self._gradients = {
                id(parameter): sampled(parameter.grad.detach()) / self._on(parameter)
                for parameter in parameters
                if parameter.grad is not None and not parameter.grad.is_sparse
            }
        self._uses += _uses([root.grad_fn for root in roots if root.grad_fn is not None])

    def after_backward(self) -> None:
        """After each backward: gradients that the loop takes otherwise are not the loss's."""
        self._in_backward = False

    def of_gradient(self, parameter: Tensor) -> Tensor | None:
        """The shadow of a parameter's gradient, after the last backward of the step.

        Returns:
            The elements that `sampled` takes, unscaled, fp32. None where it is not known: some
            use of the parameter has no shadow, such as one by a function instead of its module.
        """
        uses = self._uses[id(parameter)]
        if not uses or self._is_shadowed[id(parameter)] != uses:
            return None
        return (self._gradients or {}).get(id(parameter))

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._handles or module not in self._names or not torch.is_grad_enabled():
            return  # a copy of the model has the hook too
        if torch._C._current_graph_task_id() != -1:  # computed again, in backward
            return
        name, call = self._names[module], self._calls[module]
        self._calls[module] += 1
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        shadowed = not kwargs and _can_be_shadowed(module, args, output)
        for number, tensor in enumerate(filter(_has_numbers, tensors)):
            self.saw_fp16 |= tensor.dtype == torch.float16
            key = Key(name, "output", name if number == 0 else f"{name}[{number}]", call)
            if call < MAX_CALLS:
                shadow = _forward(module, args) if shadowed else None
                self._samples.add(tensor, key, shadow=shadow)
            # The gradient of a leaf is not of this output alone.
            if tensor.grad_fn is not None and (shadowed or call < MAX_CALLS):
                look = self._of_gradient(module, args if shadowed else None, key)
                self._handles.append(tensor.register_hook(self._guard(look)))

    def _of_gradient(
        self, module: nn.Module, args: tuple[Any, ...] | None, output: Key
    ) -> Callable[[Tensor], None]:
        versions = _versions(args)

        def look(gradient: Tensor) -> None:
            if not (self._handles and self._in_backward):
                return
            key = replace(output, kind="grad_output")
            if output.call < MAX_CALLS and key not in self._seen_gradients:
                self._seen_gradients.add(key)
                self.saw_fp16 |= gradient.dtype == torch.float16
                self._samples.add(gradient, key, scaled=self._scaled)
            if args is not None and _versions(args) == versions:  # nobody wrote to them since
                self._add_gradients(module, args, gradient)

        return look

    def _add_gradients(self, module: nn.Module, args: tuple[Any, ...], gradient: Tensor) -> None:
        own = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            return
        found = _backward(module, args, gradient, list(own))
        if found is None:
            return
        gradients = self._gradients if self._gradients is not None else {}
        for parameter, shadow in zip(own.values(), found, strict=True):
            if shadow is not None:
                part, before = sampled(shadow) / self._on(shadow), gradients.get(id(parameter))
                gradients[id(parameter)] = part if before is None else before + part
                self._is_shadowed[id(parameter)] += 1

    def _on(self, tensor: Tensor) -> Tensor | float:
        return self._scale.to(tensor.device, torch.float32) if self._scaled else 1.0


def _has_numbers(tensor: Tensor) -> bool:
    """Whether it can be looked at: not sparse, not nested, not inside of a `vmap`."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested


def _can_be_shadowed(module: nn.Module, args: tuple[Any, ...], output: Any) -> bool:
    if not type(module).__module__.startswith("torch.nn.modules."):
        return False
    given = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not isinstance(output, Tensor) or not all(map(_has_numbers, given)):
        return False
    if isinstance(module, (*_RANDOM, nn.SyncBatchNorm)) or getattr(module, "inplace", False):
        return False
    if any(True for _ in module.children()) or getattr(module, "sparse", False):
        return False
    tensors = [*(arg for arg in args if isinstance(arg, Tensor)), output, *module.parameters()]
    return any(t.is_floating_point() and t.dtype.itemsize < 4 for t in tensors)


def _copied(module: nn.Module) -> nn.Module:
    """A copy in fp32 that nothing hangs on."""
    twin = copy.copy(module)
    twin.__dict__ = {name: value for name, value in vars(module).items() if name != "forward"}
    for kind in ("_parameters", "_buffers"):
        own: Mapping[str, Tensor | None] = getattr(module, kind)
        twin.__dict__[kind] = {
            name: None if tensor is None else _in_fp32(tensor) for name, tensor in own.items()
        }
    for name, value in vars(twin).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            twin.__dict__[name] = type(value)()
    return twin


def _versions(args: tuple[Any, ...] | None) -> list[int]:
    return [arg._version for arg in args or () if isinstance(arg, Tensor)]


def _in_fp32(value: Any) -> Any:
    """A copy: of a buffer, that a forward may write to; of an input, that belongs to the loop."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    return value.float() if value.is_floating_point() else value


@contextlib.contextmanager
def _in_fp32_aside(args: tuple[Any, ...]) -> Iterator[None]:
    """Without autocast, and without a trace in the random numbers of the loop."""
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
        yield


def _forward(module: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
    """What a module would return in fp32; None where that fails."""
    try:
        with torch.no_grad(), _in_fp32_aside(args):
            return cast(Tensor, _copied(module)(*map(_in_fp32, args)))
    except Exception as error:  # memory, or a module that is not what it seems
        logger.debug("no shadow of %s: %s", type(module).__name__, error)
        return None


def _backward(
    module: nn.Module, args: tuple[Any, ...], gradient: Tensor, names: list[str]
) -> Sequence[Tensor | None] | None:
    """Gradients of a module's own parameters in fp32, scaled as `gradient` is."""
    try:
        with torch.enable_grad(), _in_fp32_aside(args):
            twin = _copied(module)
            parameters = [twin._parameters[name] for name in names]
            leaves = [p.requires_grad_() for p in parameters if p is not None]
            output = twin(*map(_in_fp32, args))
            return torch.autograd.grad(output, leaves, gradient.float(), allow_unused=True)
    except Exception as error:
        logger.debug("no shadow of %s: %s", type(module).__name__, error)
        return None


def _uses(roots: Sequence[Node]) -> Counter[int]:
    """How often the operations behind these use each parameter, by the parameter's id."""
    edges: Counter[Node] = Counter()  # into a node
    users: dict[int, list[Node]] = {}
    seen: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for source, _ in node.next_functions:
            if source is None:
                continue
            edges[source] += 1
            waiting.append(source)
            if (variable := getattr(source, "variable", None)) is not None:
                users.setdefault(id(variable), []).append(node)
    return Counter(
        {
            parameter: sum(edges[node] if node.name() in _CASTS else 1 for node in nodes)
            for parameter, nodes in users.items()
        }
    )


def _aside(method: Callable[..., None]) -> Callable[..., None]:
    """What it computes is no operation of the loop, for an observer of those."""

    def function(*args: Any) -> None:
        with _disable_current_modes():
            method(*args)

    return function
