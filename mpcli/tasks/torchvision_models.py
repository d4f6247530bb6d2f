"""torchvision's classification models, for images of any size and number of channels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mpcli.data.images import ImageInfo
from mpcli.recipe.errors import did_you_mean, user_error
from mpcli.recipe.task import TorchvisionModel, Vit

_CHANNELS = 3  # of the images that torchvision's models are made for

# Families whose stem can keep the resolution of small images, and the stem's first pooling.
# The others cut the image into patches, or have a 3x3 stride-1 first convolution anyway.
_STEM_POOLING: dict[str, str | None] = {
    "densenet": "features.pool0",
    "efficientnet": None,
    "googlenet": "maxpool1",
    "mnasnet": None,
    "mobilenet": None,
    "regnet": None,
    "resnet": "maxpool",
    "resnext": "maxpool",
    "shufflenet": "maxpool",
    "squeezenet": "features.2",
    "wide_resnet": "maxpool",
}


def build(model: TorchvisionModel, info: ImageInfo) -> nn.Module:
    """The named model with fresh weights, fitted to the images' channels and classes.

    Raises:
        UserError: an unknown name, a stem that the model cannot have, or a model that torchvision
            refuses to build for images of this size.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if model.name not in known:
        raise user_error(
            f"torchvision has no classification model `{model.name}`",
            did_you_mean(model.name, known),
            path="task.model.name",
        )
    if model.stem == "cifar" and not has_cifar_stem(model.name):
        raise user_error(
            f"`{model.name}` has no stem to make smaller",
            f"`stem: cifar` works for the families {', '.join(_STEM_POOLING)}",
            path="task.model.stem",
        )
    try:
        with _RegNetWidths() if model.name.startswith("regnet") else nullcontext():
            network: nn.Module = models.get_model(
                model.name,
                weights=None,
                num_classes=info.num_classes,
                **_size_arguments(model, info),
            )
    except (ValueError, AssertionError) as error:
        height, width = info.input_shape[1:]
        raise user_error(
            f"`{model.name}` cannot be built for {height}x{width} images: {error}",
            "choose another model",
            path="task.model.name",
        ) from error
    _fit_first_convolution(network, info.input_shape[0], small=model.stem == "cifar")
    if model.stem == "cifar":
        pooling = _STEM_POOLING[_family(model.name)]
        if pooling is not None:
            network.set_submodule(pooling, nn.Identity())
    return network


def build_vit(model: Vit, info: ImageInfo) -> nn.Module:
    """A vision transformer with fresh weights.

    Raises:
        UserError: the patches do not tile the images.
    """
    from torchvision import models

    if any(side % model.patch_size for side in info.input_shape[1:]):
        height, width = info.input_shape[1:]
        raise user_error(
            f"patches of {model.patch_size}x{model.patch_size} do not tile {height}x{width} images",
            "choose a divisor of both sides",
            path="task.model.patch_size",
        )
    network: nn.Module = models.VisionTransformer(**_vit_arguments(model, info))
    # torchvision's zeros let no gradient of the first step through to what is below.
    nn.init.trunc_normal_(network.get_parameter("heads.head.weight"), std=0.02)
    _fit_first_convolution(network, info.input_shape[0], small=False)
    return network


def vit_statements(model: Vit, info: ImageInfo, network: nn.Module) -> list[str]:
    """Python that builds `network` once more, with torchvision's `models` and torch's `nn`."""
    given = ", ".join(f"{name}={value!r}" for name, value in _vit_arguments(model, info).items())
    lines = [f"model = models.VisionTransformer({given})"]
    return lines + _first_convolution_statements(info, network)


def _vit_arguments(model: Vit, info: ImageInfo) -> dict[str, Any]:
    return {
        "image_size": info.input_shape[1],
        "patch_size": model.patch_size,
        "num_layers": model.layers,
        "num_heads": model.heads,
        "hidden_dim": model.width,
        "mlp_dim": model.mlp_width,
        "dropout": model.dropout,
        "num_classes": info.num_classes,
    }


def statements(model: TorchvisionModel, info: ImageInfo, network: nn.Module) -> list[str]:
    """Python that builds `network` once more, with torchvision's `models` and torch's `nn`."""
    arguments = {"weights": None, "num_classes": info.num_classes, **_size_arguments(model, info)}
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    lines = [f"model = models.get_model({model.name!r}{given})"]
    lines += _first_convolution_statements(info, network, small=model.stem == "cifar")
    if model.stem == "cifar" and (pooling := _STEM_POOLING[_family(model.name)]):
        lines.append(f"model.set_submodule({pooling!r}, nn.Identity())")
    return lines


def has_cifar_stem(name: str) -> bool:
    """Whether the named model can be built with `stem: cifar`."""
    return _family(name) in _STEM_POOLING


def _family(name: str) -> str:
    return next((family for family in _STEM_POOLING if name.startswith(family)), name)


def _size_arguments(model: TorchvisionModel, info: ImageInfo) -> dict[str, Any]:
    height, width = info.input_shape[1:]
    if model.name.startswith("vit_"):
        return {"image_size": height}
    if model.name.startswith("maxvit"):
        return {"input_size": (height, width)}
    if model.name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


class _RegNetWidths(TorchFunctionMode):
    """RegNet computes its widths with tensors: they need numbers on the meta device too."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange or (func is torch.tensor and isinstance(args[0], list)):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    modules = network.named_modules()
    return next((name, module) for name, module in modules if isinstance(module, nn.Conv2d))


def _first_convolution_statements(
    info: ImageInfo, network: nn.Module, *, small: bool = False
) -> list[str]:
    if not small and info.input_shape[0] == _CHANNELS:
        return []
    name, first = _first_convolution(network)
    return [f"model.set_submodule({name!r}, nn.{first!r})"]


def _fit_first_convolution(network: nn.Module, channels: int, *, small: bool) -> None:
    """Give the first convolution this many input channels; 3x3 with stride 1 when `small`."""
    name, first = _first_convolution(network)
    if not small and channels == first.in_channels:
        return
    fitted = nn.Conv2d(
        channels,
        first.out_channels,
        3 if small else first.kernel_size,  # type: ignore[arg-type]
        stride=1 if small else first.stride,  # type: ignore[arg-type]
        padding=1 if small else first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(fitted.weight, mode="fan_out", nonlinearity="relu")
    network.set_submodule(name, fitted)
