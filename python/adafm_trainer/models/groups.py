"""Groups of a network: lists of modules that are frozen or modulated together, counted from the image side."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .architecture import Groups


def group_parameters(module: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Full names and parameters of the modules ``names``."""
    for name in names:
        for leaf, parameter in module.get_submodule(name).named_parameters():
            yield f"{name}.{leaf}", parameter


def check_groups(module: nn.Module, found: Groups) -> None:
    """Raise ValueError unless the groups name modules of the network and together hold every parameter."""
    present = dict(module.named_modules())
    if absent := [name for _, names in found for name in names if name not in present]:
        raise ValueError(f"the network has no module {', '.join(absent)}; its description does not fit it")
    listed = {name for _, names in found for name, _ in group_parameters(module, names)}
    if outside := [name for name, _ in module.named_parameters() if name not in listed]:
        raise ValueError(f"parameters outside every group: {', '.join(outside[:5])}; the description does not fit")
