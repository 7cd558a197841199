"""Which modules of a network ``target_modules`` and ``exclude`` name. The vocabulary is PEFT's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .modulation import base_weight

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SHOWN = 12


def named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name it has, except what stands inside parametrizations."""
    yield prefix, module
    inner = "parametrizations" if parametrize.is_parametrized(module) else None
    for name, child in module._modules.items():
        if child is not None and name != inner:
            yield from named_modules(child, f"{prefix}.{name}" if prefix else name)


def select(
    model: nn.Module, target_modules: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> dict[str, nn.Module]:
    """The targets by one of their names, in the order of the model; each module once.

    Raises:
        TypeError: ``target_modules`` or ``exclude`` is not of a type named in ``inject``.
        ValueError: a name or pattern matches nothing, or everything that matched is excluded.
    """
    named = dict(named_modules(model))
    if target_modules is None or target_modules == "all":
        kinds = CONVOLUTIONS if target_modules is None else (*CONVOLUTIONS, nn.Linear)
        matched = {name for name, module in named.items() if isinstance(module, kinds)}
        if not matched:
            wanted = "convolution" if target_modules is None else "convolution or linear layer"
            raise ValueError(f"target_modules is {target_modules!r}, but the model has no {wanted}; {_there(named)}")
    elif isinstance(target_modules, str):
        found = _fullmatches(target_modules, named, "target_modules")
        # A pattern such as "main.*" also covers containers, activations and norms; they have no filters to modulate.
        matched = {name for name in found if _may_hold_filters(named[name])}
        if not matched:
            shown = _listed(f"{name or '(the model)'} ({type(named[name]).__name__})" for name in found)
            raise ValueError(
                f"target_modules {target_modules!r} matches only modules without a weight of rank 2 to 5: {shown}; "
                f"{_there(named)}"
            )
    else:
        matched = set()
        for entry in _entries(target_modules, "target_modules"):
            hits = {name for name in named if _ends_with(name, entry)}
            matched |= hits or _nothing(entry, named, "target_modules")
    excluded = _excluded(exclude, named)
    left = {id(named[name]): name for name in named if name in matched}
    for name in excluded:
        left.pop(id(named[name]), None)
    if not left:
        raise ValueError(f"exclude {exclude!r} leaves none of the matched modules: {_listed(sorted(matched))}")
    chosen = set(left.values())
    return {name: module for name, module in named.items() if name in chosen}


def _excluded(exclude: str | Iterable[str] | None, named: dict[str, nn.Module]) -> set[str]:
    if exclude is None:
        return set()
    if isinstance(exclude, str):
        return set(_fullmatches(exclude, named, "exclude"))
    found = set()
    for entry in _entries(exclude, "exclude"):
        hits = {name for name in named if _ends_with(name, entry)} or _nothing(entry, named, "exclude")
        found |= {name for name in named if any(name == hit or name.startswith(f"{hit}.") for hit in hits)}
    return found


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _fullmatches(pattern: str, named: dict[str, nn.Module], argument: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument} is {pattern!r}, which is no regular expression: {error}") from error
    return [name for name in named if expression.fullmatch(name)] or _nothing(pattern, named, argument)


def _entries(entries: Iterable[str], argument: str) -> list[str]:
    if not isinstance(entries, (list, tuple, set, frozenset)):
        raise TypeError(
            f"{argument} is a {type(entries).__name__}; expected None, a string (a regular expression) or a list of "
            "names"
        )
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{argument} holds {entry!r}, a {type(entry).__name__}; expected names, which are strings")
    if not entries:
        raise ValueError(f"{argument} is empty; expected at least one name, or None")
    return sorted(entries) if isinstance(entries, (set, frozenset)) else list(entries)


def _nothing(entry: str, named: dict[str, nn.Module], argument: str) -> Collection[str]:
    """Raise that ``entry`` matches nothing, with names that are near it and names that are there."""
    by_last = {name.rpartition(".")[2]: name for name in named if name}
    near = difflib.get_close_matches(entry, [*filter(None, named)], n=5, cutoff=0.6)
    near += [by_last[last] for last in difflib.get_close_matches(entry, by_last, n=5, cutoff=0.6)]
    meant = f"did you mean {_listed(dict.fromkeys(near))}? " if near else ""
    raise ValueError(
        f"{argument} {entry!r} matches no module; {meant}{_there(named)} (a string is "
        "a regular expression for the whole name; a list holds names or their last parts)"
    )


def _there(named: dict[str, nn.Module]) -> str:
    shown = [f"{n or '(the model)'} ({type(m).__name__})" for n, m in named.items() if _may_hold_filters(m)]
    return f"there are {_listed(shown)}" if shown else "no module here has a weight of rank 2 to 5"


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _may_hold_filters(module: nn.Module) -> bool:
    """Whether a module has a weight that is no vector. Quantized, lazy and other unfit ones count, and raise later."""
    if parametrize.is_parametrized(module, "weight"):
        return True
    weight = base_weight(module)
    if weight is None or is_lazy(weight):
        return weight is not None
    return not isinstance(weight, Tensor) or weight.dim() > 1
