"""Cases of single layers and blocks: adafm_layer_, block_plain_, block_adafm_, head_."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from adafm_trainer.models.blocks import ResBlock
from adafm_trainer.models.head import AdaIN, SmallH, StyleBlock
from adafm_trainer.models.names import state_from_reference, to_reference
from torch import Tensor, nn

from .compare import GoldenFile


def adafm_layer(golden: GoldenFile) -> dict[str, Tensor]:
    from adafm_kernels import modulate
    from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d

    x, weight = golden.get("in.x").requires_grad_(), golden.get("in.W")
    transposed = golden.config["op"] == "convT"
    kind, channels = (AdaFMConvTranspose2d, weight.shape[:2]) if transposed else (AdaFMConv2d, weight.shape[1::-1])
    layer = kind(*channels, tuple(weight.shape[2:]), stride=golden.config["stride"], padding=golden.config["pad"])
    layer.to(weight.dtype).requires_grad_(True)
    state = {name: golden.get(f"in.{name}") for name in ("bias", "gamma", "beta")}
    layer.load_state_dict({"weight": weight, **state})
    y = layer(x)
    results = {"out.W_mod": modulate(layer.weight, layer.gamma, layer.beta), "out.y": y}
    names = {"W": layer.weight, "gamma": layer.gamma, "beta": layer.beta, "bias": layer.bias}
    return results | gradients(golden, y, x, names) | penalty(golden, y, x, names)


def block(golden: GoldenFile) -> dict[str, Tensor]:
    convolution = nn.Conv2d
    if golden.config["kind"] == "adafm":
        from adafm_kernels.nn import AdaFMConv2d

        convolution = AdaFMConv2d
    x = golden.get("in.x").requires_grad_()
    module = ResBlock(golden.config["fin"], golden.config["fout"], conv=convolution)
    module.to(x.dtype).requires_grad_(True)
    module.load_state_dict(state_from_reference(golden.under("in.param.")))
    y = module(x)
    names = {to_reference(name): parameter for name, parameter in module.named_parameters()}
    return {"out.y": y} | gradients(golden, y, x, names) | penalty(golden, y, x, names)


def head(golden: GoldenFile) -> dict[str, Tensor]:
    x, state = golden.get("in.x").requires_grad_(), golden.under("in.param.")
    channels, arguments, extra = x.shape[1], (), {}
    if golden.path.stem.startswith("head_small_H"):
        module: nn.Module = SmallH(channels, x.shape[2], calibrated=False)
    else:
        style = golden.get("in.style").requires_grad_()
        extra["style"], arguments = style, (style,)
        if golden.path.stem.startswith("head_adain"):
            module = AdaIN(channels, style.shape[1])
        else:
            module = StyleBlock(channels, style.shape[1])
            arguments = (style, tuple(golden.sequence("in.noise.")))
    module.to(x.dtype).load_state_dict(state)
    y = module(x, *arguments)
    return {"out.y": y} | gradients(golden, y, x, dict(module.named_parameters()) | extra)


def gradients(golden: GoldenFile, y: Tensor, x: Tensor, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Derivatives of sum(gy * y)."""
    names = {"x": x, **names}
    found = torch.autograd.grad(y, list(names.values()), golden.get("in.gy"), retain_graph=True)
    return {f"out.grad.{name}": gradient for name, gradient in zip(names, found, strict=True)}


def penalty(golden: GoldenFile, y: Tensor, x: Tensor, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The squared norm of d sum(gp_v * y) / dx and its derivatives."""
    (gradx,) = torch.autograd.grad(y, x, golden.get("in.gp_v"), create_graph=True)
    loss = gradx.square().sum()
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True, materialize_grads=True)
    results = {f"out.gp.grad.{name}": gradient for name, gradient in zip(names, found, strict=True)}
    return results | {"out.gp.gradx": gradx, "out.gp.loss": loss}
