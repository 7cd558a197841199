"""Variables of TensorFlow 1 networks under our names and in our layouts: what the published families share."""

from __future__ import annotations

import re

from torch import Tensor

from .architecture import State

_LEAVES = {
    "Filters": "weight",
    "Biases": "bias",
    "W": "weight",
    "b": "bias",
    "scale": "weight",
    "offset": "bias",
}
_ROOTS = {"generator": "Generator", "average": "Generator", "discriminator": "Discriminator"}


def from_tf(network: str, state: State, modules: dict[str, str], prefix: str = "") -> State:
    """The variables of one network of ``state``, which may hold those of both.

    ``<prefix>Generator.Res1.Conv1.Filters`` becomes ``res1.conv1.weight``: modules in lower case unless ``modules``
    says otherwise. Filters ``[kh, kw, in, out]`` become ``[out, in, kh, kw]`` (those of a transposed convolution,
    ``[kh, kw, out, in]``, so become ``[in, out, kh, kw]``), matrices ``[in, out]`` are transposed. ``moving_mean`` and
    ``moving_variance`` are left out: published networks neither update nor read them. Names of another form stay.

    Raises:
        ValueError: ``network`` is not generator, discriminator or average.
    """
    if network not in _ROOTS:
        raise ValueError(f"network is {network!r}; expected one of {', '.join(_ROOTS)}")
    renamed = {}
    for name, value in state.items():
        found = re.fullmatch(rf"(?:{re.escape(prefix)})?(Generator|Discriminator)\.([\w.]+)\.(\w+)", name)
        if found is None:
            renamed[name] = value
            continue
        root, path, leaf = found.groups()
        if root != _ROOTS[network] or leaf.startswith("moving_"):
            continue
        if leaf not in _LEAVES:
            renamed[name] = value
            continue
        path = ".".join(modules.get(part, part.lower()) for part in path.split("."))
        renamed[f"{path}.{_LEAVES[leaf]}"] = _in_our_layout(value, leaf)
    return renamed


def _in_our_layout(value: Tensor, leaf: str) -> Tensor:
    if leaf == "Filters":
        value = value.permute(3, 2, 0, 1)
    elif leaf == "W":
        value = value.t()
    return value.contiguous()
