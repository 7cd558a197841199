"""Parameter names of the released GAN memory code beside ours, both ways.

Each modulation lies with its layer here and beside it there; the linear layer's gamma and beta are ``[O, 1]`` here and
``(1, O)`` there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_CONVOLUTION = {
    leaf: f"conv_{i}.{ours}"
    for i in (0, 1)
    for leaf, ours in (
        (f"AdaFM_{i}.style_gama", "gamma"),
        (f"AdaFM_{i}.style_beta", "beta"),
        (f"AdaFM_b{i}", "shift"),
    )
}
_WHOLE = {
    "AdaFM_fc.gamma": "fc.gamma",
    "AdaFM_fc.beta": "fc.beta",
    "AdaFM_fc_b": "fc.shift",
    "AdaFM_class_bias.weight": "class_bias.weight",
    "AdaFM_class_bias.bias": "class_bias.bias",
}
_TURNED = ("fc.gamma", "fc.beta")
_CONVOLUTION_BACK = {ours: theirs for theirs, ours in _CONVOLUTION.items()}
_WHOLE_BACK = {ours: theirs for theirs, ours in _WHOLE.items()}


def from_reference(name: str) -> str:
    """Our name of a released parameter; other names are returned as they are."""
    return _WHOLE.get(name) or _renamed(name, _CONVOLUTION)


def to_reference(name: str) -> str:
    """The released name of one of our parameters; other names are returned as they are."""
    return _WHOLE_BACK.get(name) or _renamed(name, _CONVOLUTION_BACK)


def state_from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dictionary, or a task's part of one, under our names and in our shapes."""
    return {ours: _turned(ours, value) for ours, value in ((from_reference(n), v) for n, v in state.items())}


def state_to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dictionary, or a task's part of one, under the released names and in the released shapes."""
    return {to_reference(name): _turned(name, value) for name, value in state.items()}


def _turned(ours: str, value: Tensor) -> Tensor:
    return value.t() if ours in _TURNED else value


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():
        if name == theirs or name.endswith("." + theirs):
            return name[: len(name) - len(theirs)] + ours
    return name
