"""The three forms in which a module of any class carries gamma and beta, and the weight that each is applied to.

- A torch layer becomes its AdaFM layer (``adafm_kernels.nn``): gamma and beta are parameters beside ``weight``.
- A weight that is a parameter of another module, or parametrized, gets a ``Modulation`` as its last parametrization.
- A weight that is computed anew before each forward and set as an attribute, as ``torch.nn.utils.spectral_norm``,
  ``weight_norm`` and ``prune`` do, is modulated where it is read: the module's class becomes a ``ComputedWeight``.

In all of them the modulation comes last: ``gamma * normalised(W) + beta``.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .._arguments import accumulation_type
from ..functional import modulate
from ..nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear

LAYERS = {nn.Conv2d: AdaFMConv2d, nn.ConvTranspose2d: AdaFMConvTranspose2d, nn.Linear: AdaFMLinear}


def identity(weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """gamma of ones and beta of zeros for a weight: ``[O, I, 1, ...]``, float32 (float64 with a float64 weight)."""
    shape = (*weight.shape[:2], *(1,) * (weight.dim() - 2))
    kind = {"dtype": accumulation_type(weight), "device": weight.device}
    return nn.Parameter(torch.ones(shape, **kind)), nn.Parameter(torch.zeros(shape, **kind))


class Modulation(nn.Module):
    """Parametrization ``weight -> gamma * weight + beta`` for ``torch.nn.utils.parametrize``.

    Made for a weight ``[O, I, *K]``; gamma and beta are ``[O, I, 1, ...]``, float32 (float64 with a float64 weight),
    and start at identity. The result has the weight's own type, under autocast too, since the module that reads it may
    do more than a convolution with it. Differentiable any number of times.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gamma, self.beta = identity(weight)

    def forward(self, weight: Tensor) -> Tensor:
        return modulate(weight, self.gamma, self.beta, dtype=weight.dtype)

    def extra_repr(self) -> str:
        return ", ".join(str(side) for side in self.gamma.shape[:2])


class ComputedWeight:
    """Mixin for a module whose ``weight`` is set anew before each forward: reading it gives the modulated one.

    The value that was set stays where torch keeps attributes, in the instance's dictionary. No modulated weight is
    stored, so no autograd graph hangs on the module and it can be copied at any time.
    """

    _plain: ClassVar[type[nn.Module]]

    @property
    def weight(self) -> Tensor:
        weight = vars(self)["weight"]
        return modulate(weight, self.gamma, self.beta, dtype=weight.dtype)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        vars(self)["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        raise AttributeError("this weight is modulated; call adafm_kernels.merge_and_unload first")

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class exists only here, so a pickle names the class it was made of.
        return (_rebuild, (self._plain,), *super().__reduce_ex__(protocol)[2:])


def give_own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own, which it may share with copies of it.

    torch keeps the property ``weight`` on the class it makes for a parametrized module, and a deep copy has the same
    class: taking the property off one of them would break the other.
    """
    kind = type(module)
    attributes = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, attributes)


@functools.cache
def with_computed_weight(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class that modulates its computed weight."""
    return type(f"Modulated{plain.__name__}", (ComputedWeight, plain), {"_plain": plain})


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    kind = with_computed_weight(plain)
    return kind.__new__(kind)


def modulation_of(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The module that holds gamma and beta of this one and the prefix of its names here; None if there is none."""
    if isinstance(module, (*LAYERS.values(), ComputedWeight)):
        return "", module
    if parametrize.is_parametrized(module, "weight"):
        for place, step in module.parametrizations.weight.named_children():
            if isinstance(step, Modulation):
                return f"parametrizations.weight.{place}.", step
    return None


@torch.no_grad()
def base_weight(module: nn.Module) -> Any:
    """The weight that our modulation is applied to, as it is in evaluation; nothing in the module changes.

    For a parametrized weight that is adapted, the modulated one. Not a tensor where the module has none, as in
    quantized modules, where it is a method. None for scripted modules.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if parametrize.is_parametrized(module, "weight"):
        return _parametrized_weight(module)
    for place in (module._parameters, module._buffers):
        if place.get("weight") is not None:
            return place["weight"]
    hook = weight_hook(module)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module)
    if hook is not None:
        return hook.apply_mask(module)
    weight = vars(module).get("weight", getattr(type(module), "weight", None))
    if isinstance(weight, Tensor):
        # An attribute stays behind when a module is moved or cast; the parameter it is computed from does not.
        source = next((p for p in module.parameters(recurse=False) if p.shape == weight.shape), weight)
        weight = weight.to(source)
    return weight


def _parametrized_weight(module: nn.Module) -> Tensor:
    """The parametrized weight as in evaluation: spectral normalisation does no power iteration."""
    chain = module.parametrizations.weight
    modes = [(step, step.training) for step in chain.modules()]
    chain.eval()
    try:
        return chain()
    finally:
        for step, training in modes:
            step.training = training


def weight_hook(module: nn.Module) -> Any:
    """The forward pre-hook of torch that computes ``weight``: spectral or weight normalisation, pruning; else None."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (SpectralNorm, WeightNorm)) and hook.name == "weight":
            return hook
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            return hook
    return None
