"""The rest of the op family: many weights at once, a set of gamma and beta for each sample, normalised, low-rank.

Each computes in float32 (float64 for a float64 weight) whatever the types, also under autocast, and rounds once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from ._ops_lowrank import ModulateLowrank
from ._ops_many import modulate_many as _modulate_many
from ._ops_normalized import ModulateNormalized
from ._ops_per_sample import ModulatePerSample
from .functional import result_type


def modulate_many(
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """``modulate`` of all weights of a network in one launch; their gradients are one launch too.

    Args:
        weights: each ``[O, I, *K]`` as in ``modulate``, all of one type on one device.
        gammas, betas: one for each weight, as in ``modulate``; None for one and zero.
        dtype: type of the results; None: as in ``modulate``.
        memory_format: ``torch.channels_last`` asks for channels-last wherever a weight's rank has it (4 and 5), and for
            contiguous elsewhere; None: each in its weight's layout.
        backend: as in ``modulate``.

    Returns:
        Fresh tensors of the weights' shapes, in their order.

    Differentiable any number of times; value and first derivative are one launch each. ``torch.func.grad``, ``vmap``
    and ``torch.compile(fullgraph=True)`` work; forward mode raises. For a training loop see ``ModulationPlan``, which
    does this once for each optimizer step, without allocating.

    Raises:
        TypeError, ValueError, RuntimeError: as ``modulate``, naming the list and the number of the layer; the lists
            differ in length.
    """
    for name, tensors in (("weights", weights), ("gammas", gammas), ("betas", betas)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name} is a {type(tensors).__name__}; expected a list of tensors")
        for number, tensor in enumerate(tensors):
            _check_tensor(tensor, f"{name}[{number}]", optional=name != "weights")
    if not weights and not gammas and not betas:
        return []
    if dtype is None and weights:
        dtype = result_type(weights[0])
    return _modulate_many(weights, gammas, betas, dtype, memory_format, _backend(backend))


def modulate_per_sample(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    """``gamma[n] * weight + beta[n]`` for N sets of gamma and beta; the weight is read once.

    ``result.flatten(0, 1)`` is the weight of a convolution with ``groups = N`` over the samples' channels side by side.
    ``torch.vmap`` of ``modulate`` over gamma and beta is this op.

    Args:
        weight: ``[O, I, *K]`` as in ``modulate``.
        gamma, beta: ``[N, O, I]`` with 1 in place of any of the three and any number of trailing ones; one of them may
            be None (one, zero).
        dtype, memory_format, backend: as in ``modulate``. Channels-last is the order inside each sample's weight.

    Returns:
        ``[N, O, I, *K]``, N weights one behind the other.

    The weight's gradient is the sum over the samples, in their order. Differentiable any number of times; forward mode
    raises.

    Raises:
        TypeError, ValueError, RuntimeError: as ``modulate``; gamma and beta are both None, or differ in N.
    """
    _check_tensors(weight, gamma, beta)
    dtype = result_type(weight) if dtype is None else dtype
    return ModulatePerSample.apply(weight, gamma, beta, dtype, memory_format, _backend(backend))


def modulate_normalized(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    over: str = "filter",
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    """``gamma * (weight - mean) / deviation + beta``, with gradients through mean and deviation.

    The modulation of GAN memory (Cong et al., NeurIPS 2020, equation 4) for a weight that is trained. A frozen weight
    is better normalised once, and then given to ``modulate``: the same numbers without the work.

    Args:
        weight: ``[O, I, *K]`` as in ``modulate``.
        gamma, beta: as in ``modulate``.
        over: "filter": mean and sample deviation of the taps of each ``[o, i]``; "channel": of all weights of each
            ``[o]``, as for fully connected layers.
        eps: a deviation below it is replaced by it, and then has no gradient. The reference has no such guard.
        dtype, memory_format, backend: as in ``modulate``.

    Returns:
        A fresh tensor of the weight's shape.

    Differentiable any number of times; forward mode raises.

    Raises:
        TypeError, ValueError, RuntimeError: as ``modulate``; fewer than two weights share a deviation.
    """
    _check_tensors(weight, gamma, beta)
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps is a {type(eps).__name__}; expected a number")
    dtype = result_type(weight) if dtype is None else dtype
    return ModulateNormalized.apply(weight, gamma, beta, over, float(eps), dtype, memory_format, _backend(backend))


def modulate_lowrank(
    weight: Tensor,
    gamma: Tensor | None,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    beta: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    """``(gamma + u diag(s) v^T) * weight + beta``; the sum in brackets is formed in registers, never in memory.

    The low-rank storage of gamma over a sequence of tasks is that of GAN memory (Cong et al., NeurIPS 2020, section
    4.3).

    Args:
        weight: ``[O, I, *K]`` as in ``modulate``.
        gamma, beta: as in ``modulate``; None for one and zero.
        u, s, v: ``[O, R]``, ``[R]``, ``[I, R]``; R may be 0.
        dtype, memory_format, backend: as in ``modulate``.

    Returns:
        A fresh tensor of the weight's shape.

    Gradients come back for every argument, each in its own shape and dtype. Differentiable any number of times; forward
    mode raises.

    Raises:
        TypeError, ValueError, RuntimeError: as ``modulate``; the factors do not fit the weight or each other.
    """
    _check_tensors(weight, gamma, beta)
    for name, factor in (("u", u), ("s", s), ("v", v)):
        _check_tensor(factor, name, optional=False)
    dtype = result_type(weight) if dtype is None else dtype
    return ModulateLowrank.apply(weight, gamma, u, s, v, beta, dtype, memory_format, _backend(backend))


def _backend(name: str | None) -> str | None:
    return backends.forced_backend() if name is None else name


def _check_tensors(weight: Tensor, gamma: Tensor | None, beta: Tensor | None) -> None:
    _check_tensor(weight, "weight", optional=False)
    _check_tensor(gamma, "gamma", optional=True)
    _check_tensor(beta, "beta", optional=True)


def _check_tensor(value: Tensor | None, name: str, optional: bool) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor{' or None' if optional else ''}")
