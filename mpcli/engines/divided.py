"""What the engines share that divide weights among the ranks."""

from __future__ import annotations

import torch
from torch import Size, Tensor, nn

from mpcli.engines.local import LocalEngine, foreign
from mpcli.precision.formats import dtype_name
from mpcli.precision.observe import TypesObserver, observed_types
from mpcli.recipe.errors import user_error
from mpcli.records import ModuleTypes


class DividedEngine(LocalEngine):
    """The local step on this rank's parts of the weights, in the memory that is stepped.

    Attributes:
        parts: fp32, this rank's of every parameter, by name; they may be empty.
        shapes: of the whole parameters, by name.
        forward_types: of the parameters in forward, by name.
    """

    parts: dict[str, Tensor]
    shapes: dict[str, Size]
    forward_types: dict[str, torch.dtype]

    def _part_of(self, name: str, whole: Tensor) -> Tensor:
        """Of a tensor that has the shape of a parameter this rank's part."""
        raise NotImplementedError

    def _types_in_forward(self, observer: TypesObserver) -> dict[str, ModuleTypes]:
        """Storage and gradients are of the types that a single device would have them in.

        To be called when the step's gradients are in the parts.
        """
        observed = observed_types(self.model, observer)
        stored: dict[str, set[str]] = {}
        learnt: dict[str, set[str]] = {}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for module_name, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                name = names[parameter]
                dtype = dtype_name(self.forward_types[name])
                stored.setdefault(module_name, set()).add(dtype)
                if self.parts[name].grad is not None:
                    learnt.setdefault(module_name, set()).add(dtype)
        return {
            name: types.model_copy(
                update={
                    "stored": "+".join(sorted(stored.get(name, "-"))),
                    "gradient": "+".join(sorted(learnt.get(name, "-"))),
                }
            )
            for name, types in observed.items()
        }

    def _over_ranks(
        self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        numbers = (loss, grad_norm.double().square(), found_inf)
        sums = torch.stack([number.to(self.device, torch.float64) for number in numbers])
        loss, squares, found = self.ranks.sum_(sums).to(self.home).unbind()
        return loss.float(), squares.sqrt().float(), (found > 0).float()

    def _part_here(self, key: str, whole: Tensor) -> Tensor:
        name = self._divided_in(key, whole)
        if not name:
            return whole
        if whole.shape != self.shapes[name]:
            raise foreign(f"`{key}` is {list(whole.shape)}, and {list(self.shapes[name])} here")
        return self._part_of(name, whole)

    def _state(self) -> dict[str, Tensor]:
        state = super()._state()
        for name, exact in self.parts.items():
            dtype = self.forward_types[name]
            state[f"model.{name}"] = exact.to(dtype)
            if dtype != exact.dtype:
                state[f"master.{name}"] = exact
        return state

    def _divided_in(self, key: str, tensor: Tensor) -> str | None:
        """The parameter of whose shape a tensor of a checkpoint is; None for what is whole."""
        kind, _, name = key.partition(".")
        if kind == "optimizer":
            name = name.partition(".")[2]
        of_parameter = kind in ("model", "master", "optimizer", "average")
        # Adam's `step` is whole.
        return name if of_parameter and name in self.parts and tensor.ndim else None

    def weights(self) -> dict[str, Tensor]:
        """The exact weights and the buffers that the next forward has, by name: no averages."""
        weights = {name: self._whole(name, part) for name, part in self.parts.items()}
        return weights | {name: value.detach() for name, value in self.model.named_buffers()}

    def state_dict(self) -> dict[str, Tensor]:
        """The model's weights and buffers on the CPU, whole in rank 0; the others have none."""
        exact = self.parts | dict(zip(self.names, self._averages() or self.masters, strict=True))
        whole: dict[Tensor, Tensor] = {}
        for name, parameter in self.model.named_parameters():  # one after the other, for the room
            gathered = self._whole(name, exact[name])
            if self.ranks.is_main:
                whole[parameter] = gathered.cpu()
        if not self.ranks.is_main:
            return {}
        state = self.model.state_dict(keep_vars=True)
        return {name: whole.get(value, value).detach().cpu() for name, value in state.items()}


def refuse_numbers(model: nn.Module, divider: str) -> None:
    """Check that every parameter has a dimension.

    Raises:
        UserError: exit 2, one has none.
    """
    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            raise user_error(
                f"`{name}` is a single number, which {divider} cannot divide",
                "make it a vector of one element, or use `kind: ddp`",
                path="engine.kind",
            )
