"""What of an adapted network is trained, counted and stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .matching import named_modules
from .modulation import modulation_of

_BIAS = ("none", "all", "adafm_only")


class TrainableCounts(NamedTuple):
    """Numbers of trainable parameters, of all parameters, and of adapted modules."""

    trainable: int
    total: int
    modules: int


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted modules by their first name; each once."""
    seen: set[int] = set()
    found = {}
    for name, module in named_modules(model):
        if id(module) not in seen and modulation_of(module) is not None:
            found[name] = module
        seen.add(id(module))
    return found


def nothing_adapted(model: nn.Module) -> ValueError:
    return ValueError(f"no module of the {type(model).__name__} is adapted; call adafm_kernels.inject(model) first")


def check_bias(bias: str) -> None:
    if bias not in _BIAS:
        raise ValueError(f"bias is {bias!r}; expected one of {', '.join(map(repr, _BIAS))}")


def _trained(model: nn.Module, bias: str) -> Iterator[tuple[str, nn.Parameter]]:
    """gamma, beta and the asked biases, under every name they have in the state dict."""
    for name, module in named_modules(model):
        dot = f"{name}." if name else ""
        held = modulation_of(module)
        if held is not None:
            prefix, holder = held
            yield f"{dot}{prefix}gamma", holder.gamma
            yield f"{dot}{prefix}beta", holder.beta
        if bias == "all" or (bias == "adafm_only" and held is not None):
            for own, parameter in module._parameters.items():
                if parameter is not None and "bias" in own.split("_"):
                    yield f"{dot}{own}", parameter
            if parametrize.is_parametrized(module, "bias"):
                for own, parameter in module.parametrizations.bias.named_parameters():
                    yield f"{dot}parametrizations.bias.{own}", parameter


def mark_only_adafm_trainable(model: nn.Module, bias: str = "none") -> None:
    """Set ``requires_grad`` to True for gamma and beta of every adapted module and to False for all other parameters.

    Args:
        model: a network with adapted modules.
        bias: "none": no bias is trained. "adafm_only": those of the adapted modules are. "all": every parameter named
            ``bias`` (or ``bias_...``, ``..._bias``) is.

    Raises:
        TypeError: model is not a module.
        ValueError: bias is none of the three, or nothing is adapted.
    """
    trained = {id(parameter) for _, parameter in _of_adapted(model, bias)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def print_trainable(model: nn.Module) -> TrainableCounts:
    """Print, and return, how many parameters are trainable, how many there are, and how many modules are adapted.

    A parameter that several modules share counts once.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total = sum(size for size, _ in sizes)
    counts = TrainableCounts(sum(size for size, trained in sizes if trained), total, len(adapted_modules(model)))
    share = 100 * counts.trainable / total if total else 0.0
    print(
        f"trainable params: {counts.trainable:,d} || all params: {total:,d} || trainable%: {share:.4f} || "
        f"adapted modules: {counts.modules:,d}"
    )
    return counts


def adafm_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """gamma and beta of every adapted module, and the asked biases, under their names in ``model.state_dict()``.

    A file of these is all that is needed beside the base's. The tensors are those of the model, detached, not copies.

    Raises:
        TypeError: model is not a module.
        ValueError: bias is not "none", "all" or "adafm_only", or nothing is adapted.
    """
    return {name: parameter.detach() for name, parameter in _of_adapted(model, bias)}


def load_adafm_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy what ``adafm_state_dict`` gave into a network with the same modules adapted.

    Raises:
        TypeError: model is not a module, state_dict no mapping, or a value in it no tensor.
        ValueError: nothing is adapted; gamma or beta of an adapted module is missing; a name is not that of a gamma,
            beta or bias; a shape does not fit. Nothing is then copied.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; expected a mapping of names to tensors")
    expected = dict(_of_adapted(model, "none"))
    known = expected | dict(_of_adapted(model, "all"))
    missing, unknown = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - known.keys())
    if missing or unknown:
        parts = [("misses", missing), ("holds, and the model does not adapt,", unknown)]
        told = "; ".join(f"{verb} {', '.join(names[:8])} ({len(names)} in all)" for verb, names in parts if names)
        raise ValueError(f"state_dict {told}; adapt the model with the target_modules the file was made with")
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} in state_dict is a {type(tensor).__name__}; expected a tensor")
        if tensor.shape != known[name].shape:
            raise ValueError(f"{name} in state_dict has shape {list(tensor.shape)}; expected {list(known[name].shape)}")
    with torch.no_grad():
        for name, tensor in state_dict.items():
            known[name].copy_(tensor)


def _of_adapted(model: nn.Module, bias: str) -> list[tuple[str, nn.Parameter]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    check_bias(bias)
    if not adapted_modules(model):
        raise nothing_adapted(model)
    return list(_trained(model, bias))
