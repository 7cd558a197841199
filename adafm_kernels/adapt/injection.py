"""``inject``: AdaFM into any ``nn.Module`` in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .. import _arguments
from .matching import select
from .modulation import LAYERS, Modulation, base_weight, give_own_class, identity, modulation_of, with_computed_weight
from .trainable import check_bias, mark_only_adafm_trainable

_Model = TypeVar("_Model", bound=nn.Module)


def inject(
    model: _Model,
    target_modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    freeze: bool = True,
    bias: str = "none",
) -> _Model:
    """Give modules of ``model`` a gamma and a beta: their weight becomes ``gamma * weight + beta``. Works in place.

    gamma and beta are ``[O, I, 1, ...]`` over the two leading dimensions of the weight ``[O, I, *K]``, float32 (float64
    with a float64 weight), and start at one and zero: the output stays the same bit for bit. Modules keep their
    identity and their names, so hooks, shared modules and references go on working. How gamma and beta are carried:

    - ``nn.Conv2d``, ``nn.ConvTranspose2d`` and ``nn.Linear``, exactly these and without hooks or other state, become
      ``AdaFMConv2d``, ``AdaFMConvTranspose2d`` and ``AdaFMLinear`` with parameters ``gamma`` and ``beta``.
    - Other modules with a floating-point parameter ``weight`` of rank 2 to 5, subclasses and parametrized ones among
      them, get a ``Modulation`` as the last entry of ``parametrizations.weight``.
    - Where hooks or an outer module set ``weight`` before each forward (``torch.nn.utils.spectral_norm``,
      ``weight_norm``, ``prune``), what they set is modulated where it is read; ``gamma`` and ``beta`` are parameters of
      the module.

    **Normalised weights** are modulated after the normalisation: ``gamma * SN(W) + beta``. The power iteration goes on
    as without modulation. A module that normalises ``self.weight`` inside its own forward gets the modulated weight.

    **State dicts of the base** load with ``strict=False``, before and after training, and then only names of gamma and
    beta are reported missing. (torch renames a parametrized ``weight``; the base's name is understood as well.)

    Args:
        model: any module, also a single layer. Only its registered submodules are looked at.
        target_modules: None: every convolution and transposed convolution of one to three dimensions, subclasses
            included. ``"all"``: ``nn.Linear`` as well. Any other string: a regular expression that must match the whole
            qualified name; containers, and modules whose weight is a vector, are passed over. A list: full names or
            dotted suffixes of them (``"conv1"`` matches ``"block.conv1"``); each must match something.
        exclude: modules to leave as they are; a string or a list as above. An entry of a list also excludes what lies
            inside the module it names. It must match something.
        freeze: train gamma and beta alone: ``requires_grad`` is set to False everywhere else, as
            ``mark_only_adafm_trainable(model, bias)`` does. Buffers, such as the statistics of a batch normalisation,
            are not parameters and move on in training mode. False: everything keeps its ``requires_grad``.
        bias: "none", "all" or "adafm_only": the biases that are trained as well; see ``mark_only_adafm_trainable``.

    Returns:
        ``model``. A module with several names is adapted once (and not, if one of its names is excluded). Modules that
        share one weight Parameter each get their own gamma and beta over it.

    Raises:
        TypeError: an argument is of the wrong type; a target has no weight parameter, a weight that is not floating
            point (quantized), or is scripted.
        ValueError: nothing is matched (the message lists near names and what is there); a target is adapted already, is
            lazy and has no shape yet, or has a weight of rank 1 or above 5.

    The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model is a {type(model).__name__}, which cannot be changed; adapt it before it is scripted")
    check_bias(bias)
    targets = select(model, target_modules, exclude)
    # Everything that can fail for a reason of its own, allocation included, is done before the first change.
    changes = [_change(name or "the model", module) for name, module in targets.items()]
    restore = _snapshot(targets.values(), model)
    try:
        for change in changes:
            change()
        if freeze:
            mark_only_adafm_trainable(model, bias)
    except BaseException:
        restore()
        raise
    return model


def _change(name: str, module: nn.Module) -> Callable[[], None]:
    """What adapts a module, checked and ready."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{name} is a {kind}, which cannot be changed; adapt it before it is scripted")
    if modulation_of(module) is not None:
        raise ValueError(f"{name} ({kind}) is adapted already; exclude it, or call merge_and_unload first")
    weight = base_weight(module)
    if is_lazy(weight):
        raise ValueError(f"the weight of {name} ({kind}) has no shape yet; run one forward through the model first")
    if not isinstance(weight, Tensor) or "weight" in module._buffers:
        if weight is None:
            inner = ", ".join(child for child, _ in list(module.named_modules())[1:5])
            raise TypeError(
                f"{name} is a {kind} without a weight; expected a module with a floating-point parameter named weight"
                + (f" (name the modules inside it: {inner}, ...)" if inner else "")
            )
        found = "buffer" if "weight" in module._buffers else type(weight).__name__
        raise TypeError(f"the weight of {name} ({kind}) is a {found}; expected a floating-point parameter")
    _arguments.check_weight(weight, f"the weight of {name} ({kind})")
    if _is_plain(module):
        return partial(_become, module, _layer(module))
    if "weight" in module._parameters or parametrize.is_parametrized(module, "weight"):
        return partial(_parametrize, module, Modulation(weight))
    for parameter in ("gamma", "beta"):
        if hasattr(module, parameter):
            raise ValueError(f"{name} ({kind}) has an attribute {parameter} of its own; rename it, or exclude {name}")
    return partial(_modulate_computed, module, *identity(weight))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is exactly a torch layer that we have a form of, with nothing hung onto it."""
    return (
        type(module) in LAYERS
        and module._parameters.keys() == {"weight", "bias"}
        and not (module._buffers or module._modules)
        and not any(value for key, value in vars(module).items() if key.endswith("_hooks"))
        and not vars(module).keys() & {"forward", "_conv_forward", "_output_padding", "gamma", "beta"}
    )


def _layer(module: nn.Module) -> nn.Module:
    layer = LAYERS[type(module)].from_module(module, freeze=False)
    # A network may have put a weight of another shape in without changing the layer's settings.
    layer.gamma, layer.beta = identity(module.weight)
    return layer


def _become(module: nn.Module, layer: nn.Module) -> None:
    for key, value in vars(layer).items():
        vars(module).setdefault(key, value)
    module._parameters.update(layer._parameters)
    module.__class__ = type(layer)


def _parametrize(module: nn.Module, modulation: Modulation) -> None:
    fresh = not parametrize.is_parametrized(module, "weight")
    if fresh and parametrize.is_parametrized(module):
        give_own_class(module)
    # "unsafe" leaves out torch's trial run, which would advance the power iteration of a spectral normalisation.
    parametrize.register_parametrization(module, "weight", modulation, unsafe=True)
    if fresh:
        # torch leaves the containers in training mode.
        module.parametrizations.training = module.parametrizations.weight.training = module.training
        module.register_load_state_dict_pre_hook(load_plain_weight)


def load_plain_weight(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: let ``weight`` of a plain module go to where torch keeps a parametrized one."""
    original = f"{prefix}parametrizations.weight.original"
    if f"{prefix}weight" in state_dict and original not in state_dict:
        state_dict[original] = state_dict.pop(f"{prefix}weight")


def _modulate_computed(module: nn.Module, gamma: nn.Parameter, beta: nn.Parameter) -> None:
    module.register_parameter("gamma", gamma)
    module.register_parameter("beta", beta)
    # The next forward sets it anew; a graph that it still carries would only forbid copies of the module.
    vars(module)["weight"] = vars(module)["weight"].detach()
    module.__class__ = with_computed_weight(type(module))


def _snapshot(targets: Iterable[nn.Module], model: nn.Module) -> Callable[[], None]:
    """A function that puts classes, attributes and ``requires_grad`` back as they are now."""
    # The dictionaries inside (parameters, hooks) are put back in place, since handles of hooks refer to them.
    modules = [
        (
            module,
            type(module),
            dict(vars(module)),
            [(d, dict(d)) for d in vars(module).values() if isinstance(d, dict)],
        )
        for target in targets
        for module in target.modules()
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, kind, attributes, dictionaries in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for dictionary, content in dictionaries:
                dictionary.clear()
                dictionary.update(content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return restore
