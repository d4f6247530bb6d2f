"""`sensitive_layers`: from patterns to the modules of a model that compute in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.loss import _Loss

from mpcli.recipe.errors import Problem, UserError, closest
from mpcli.recipe.precision import GROUPS

NORMS = (
    _NormBase,  # of batches and of instances
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
SOFTMAXES = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
OUTSIDE_MODULES = ("softmax", "loss")
"""Groups that may be there without a module: calls of `F.softmax`, the task's loss."""


def sensitive_modules(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """The modules that compute in fp32, in the model's order, and why.

    These are the modules that a pattern matches with everything inside them, and those that share
    a parameter with one of them (tied weights): a parameter is stored in one type.

    Returns:
        Name of the module -> the pattern, or the module that it shares a parameter with.

    Raises:
        UserError: a problem for each pattern that matches nothing, except `softmax` and `loss`:
            only the caller knows whether the model or its task computes them outside modules. It
            finds out with `matched` and says so with `no_match`.
    """
    reasons: dict[nn.Module, str] = {}
    problems: list[Problem] = []
    for index, pattern in enumerate(patterns):
        names = matched(model, pattern)
        if not names and pattern not in OUTSIDE_MODULES:
            problems.append(no_match(model, pattern, index))
        for name in names:
            _add_with_insides(reasons, model.get_submodule(name), pattern)
    if problems:
        raise UserError(*problems)
    while sharing := next(_sharing_a_parameter(model, reasons), None):
        _add_with_insides(reasons, *sharing)
    return {name: reasons[module] for name, module in model.named_modules() if module in reasons}


def _add_with_insides(reasons: dict[nn.Module, str], module: nn.Module, reason: str) -> None:
    for inside in module.modules():
        reasons.setdefault(inside, reason)


def _sharing_a_parameter(
    model: nn.Module, sensitive: dict[nn.Module, str]
) -> Iterator[tuple[nn.Module, str]]:
    """Modules that are not sensitive and own a parameter of one that is; and the reason."""
    owners = {
        parameter: name
        for name, module in model.named_modules()
        if module in sensitive
        for parameter in module.parameters(recurse=False)
    }
    for module in model.modules():
        if module not in sensitive:
            for parameter in module.parameters(recurse=False):
                if parameter in owners:
                    yield module, f"shares a parameter with {owners[parameter]}"


def matched(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that a pattern matches, in the model's order.

    A pattern is a group; a glob over names, in which `*` crosses dots and `P.*` is P and
    everything in it; or a class name, that of the module's class or of a base class. A group
    also matches the modules of that name.
    """
    group = set(_group(model, pattern)) if pattern in GROUPS else set()
    found = {
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if module in group or _name_matches(name, pattern) or pattern in _class_names(module)
    }
    return [name for name, module in model.named_modules() if module in found]


def _name_matches(name: str, pattern: str) -> bool:
    if pattern in GROUPS:
        return name.rpartition(".")[2] == pattern
    globs = (pattern, pattern.removesuffix(".*"))
    # A name may hold a `[` or `*` of its own, as a key of a ModuleDict.
    return name == pattern or any(fnmatchcase(name, glob) for glob in globs)


def _class_names(module: nn.Module) -> list[str]:
    """Names of the module's class and its bases below `nn.Module`."""
    classes = type(module).__mro__
    return [c.__name__ for c in classes if issubclass(c, nn.Module) and c is not nn.Module]


def _group(model: nn.Module, word: str) -> list[nn.Module]:
    """The modules that belong to a group by what they are."""
    if word == "head":
        return [model.get_submodule(last_layer(model))]
    is_member: dict[str, Callable[[nn.Module], bool]] = {
        "norm": _is_norm,
        "softmax": lambda module: isinstance(module, SOFTMAXES),
        "attention": _owns_attention,
        "embedding": lambda module: isinstance(module, nn.Embedding | nn.EmbeddingBag),
        "loss": lambda module: isinstance(module, _Loss),
    }
    return [module for module in model.modules() if is_member[word](module)]


def _is_norm(module: nn.Module) -> bool:
    # Only leaves by name: a `PreNorm` wraps a whole block.
    named = type(module).__name__.endswith("Norm") and not list(module.children())
    return isinstance(module, NORMS) or named


def _owns_attention(module: nn.Module) -> bool:
    """Whether this is the innermost module of a class called `...Attention...`."""
    named = ["Attention" in " ".join(_class_names(inside)) for inside in module.modules()]
    return named[0] and not any(named[1:])


def norm_modules(model: nn.Module) -> list[str]:
    """Names of the normalisation layers: torch's, and leaves of a class called `...Norm`."""
    return [name for name, module in model.named_modules() if _is_norm(module)]


def lstm_modules(model: nn.Module) -> list[str]:
    """Names of the `nn.LSTM`s."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.LSTM)]


def last_layer(model: nn.Module) -> str:
    """Name of the head: the last module, in the order of registration, that owns parameters.

    Norms count only where there is nothing else. The model must have parameters.
    """
    owners = [(name, m) for name, m in model.named_modules() if list(m.parameters(recurse=False))]
    heads: list[str] = [name for name, module in owners if not _is_norm(module)]
    return heads[-1] if heads else owners[-1][0]


def no_match(model: nn.Module, pattern: str, index: int) -> Problem:
    """The error of the pattern at `index` of `sensitive_layers`, which matches nothing."""
    if pattern in GROUPS:
        present = [group for group in GROUPS if group == "loss" or matched(model, group)]
        hint = f"groups of this model: {', '.join(f'`{group}`' for group in present)}"
    elif near := closest(pattern, _known_patterns(model, pattern)):
        hint = f"did you mean `{near}`?"
    else:
        hint = "`mptrain plan` without it shows the names and classes of the modules"
    path = f"precision.sensitive_layers.{index}"
    return Problem(f"`{pattern}` matches no module of this model", hint, path=path)


def _known_patterns(model: nn.Module, pattern: str) -> set[str]:
    """Patterns that match, of the kind of a given one."""
    names = {name for name, _ in model.named_modules() if name}
    if "*" in pattern:
        last_parts = {name.rpartition(".")[2] for name in names}
        return names | {f"{name}.*" for name in names} | {f"*.{part}" for part in last_parts}
    parts = list(model.modules())[1:]  # the model's own class means all of it
    classes = {name for module in parts for name in _class_names(module)}
    return {*GROUPS, *names, *(name for name in classes if not name.startswith("_"))}
