"""``merge_and_unload``: plain modules again, with the modulated weight."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook

from ..functional import modulate
from .injection import load_plain_weight
from .modulation import (
    LAYERS,
    ComputedWeight,
    Modulation,
    base_weight,
    give_own_class,
    modulation_of,
    weight_hook,
)
from .trainable import adapted_modules, nothing_adapted

_Model = TypeVar("_Model", bound=nn.Module)

_PLAIN = {form: plain for plain, form in LAYERS.items()}


@torch.no_grad()
def merge_and_unload(model: _Model) -> _Model:
    """Make every adapted module of ``model`` what it was, with the modulated weight. Works in place; returns ``model``.

    Classes and names are those before ``inject`` (or of the torch layer, for AdaFM layers made in another way). The
    weight is bit for bit the modulated weight in evaluation mode, in the type and layout of the base's. It is a new
    Parameter, so modules that shared one weight share it no longer; its ``requires_grad`` is that of the base's weight.

    Spectral and weight normalisation, pruning and other parametrizations of an adapted weight are merged with it: the
    whole chain ``gamma * normalised(W) + beta`` becomes one plain weight, with the power iteration as it stands.

    Raises:
        TypeError: model is not a module.
        ValueError: nothing is adapted, or an adapted module cannot be merged: its class is derived from an AdaFM layer,
            or an outer module sets its weight before each forward. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    adapted = adapted_modules(model)
    if not adapted:
        raise nothing_adapted(model)
    weights = [_merged_weight(name or "the model", module) for name, module in adapted.items()]
    for module, weight in zip(adapted.values(), weights, strict=True):
        _unload(module, weight)
    return model


def _merged_weight(name: str, module: nn.Module) -> Tensor:
    gamma_and_beta = modulation_of(module)[1]
    if isinstance(gamma_and_beta, Modulation):
        return base_weight(module)
    kind = parametrize.type_before_parametrizations(module)
    if kind not in _PLAIN and not isinstance(module, ComputedWeight):
        raise ValueError(
            f"{name} is a {kind.__name__}, a class derived from an AdaFM layer; there is no plain class to give back"
        )
    is_stored = "weight" in module._parameters or parametrize.is_parametrized(module, "weight")
    if not is_stored and weight_hook(module) is None:
        raise ValueError(
            f"the weight of {name} ({kind.__name__}) is set before each forward by code outside torch, which would "
            "overwrite a merged weight; remove that code's normalisation first"
        )
    weight = base_weight(module)
    return modulate(weight, module.gamma, module.beta, dtype=weight.dtype)


def _unload(module: nn.Module, weight: Tensor) -> None:
    requires_grad = _base_requires_grad(module)
    own = not isinstance(modulation_of(module)[1], Modulation)
    if isinstance(module, ComputedWeight):
        module.__class__ = module._plain
    if parametrize.is_parametrized(module, "weight"):
        # torch can give one original back as it is, and several only evaluated; either is replaced below.
        give_own_class(module)
        several = not module.parametrizations.weight.is_tensor
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=several)
        _drop_load_hooks(module)
    elif "weight" not in module._parameters:
        _remove_hook(module)
    if own:
        del module.gamma, module.beta
        module.__class__ = _PLAIN.get(type(module), type(module))
    del module.weight
    rest = dict(module._parameters)
    module._parameters.clear()
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=requires_grad))
    module._parameters.update(rest)


def _base_requires_grad(module: nn.Module) -> bool:
    if parametrize.is_parametrized(module, "weight"):
        return any(p.requires_grad for p in module.parametrizations.weight.parameters(recurse=False))
    stored = (module._parameters.get(name) for name in ("weight", "weight_orig", "weight_v"))
    return any(parameter.requires_grad for parameter in stored if parameter is not None)


def _remove_hook(module: nn.Module) -> None:
    hook = weight_hook(module)
    if isinstance(hook, SpectralNorm):
        remove_spectral_norm(module)
        # torch looks for its load hook and misses it, and a plain state dict would not load strictly.
        _drop_load_hooks(module)
    elif isinstance(hook, prune.BasePruningMethod):
        prune.remove(module, "weight")
    else:
        remove_weight_norm(module)


def _drop_load_hooks(module: nn.Module) -> None:
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        if hook is load_plain_weight or isinstance(hook, SpectralNormLoadStateDictPreHook):
            del hooks[key]
