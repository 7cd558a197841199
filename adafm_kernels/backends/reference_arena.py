"""The definition of the whole-network ops in plain PyTorch: the single layer's definition, layer after layer.

``layers`` is int64 ``[L, 6]``: first weight, first pair, O, I, taps, flags. A layer's weights lie as ``[O, taps, I]``.
Arguments are checked by the caller; ``tiles`` is for other backends. Nothing between the layers is written.
"""

from collections.abc import Iterator

from torch import Tensor

_FIXED = (1, 2)  # flags of a gamma, of a beta that the optimizer step leaves as they are


def modulate_many_out(
    weight: Tensor, gamma: Tensor, beta: Tensor, layers: Tensor, tiles: Tensor | None, out: Tensor
) -> None:
    """out = gamma * weight + beta for every layer."""
    for weights, pairs, sizes, _ in _layers(layers):
        values = weight[weights].view(sizes).to(gamma.dtype)
        outer, _, inner = sizes
        result = gamma[pairs].view(outer, 1, inner) * values + beta[pairs].view(outer, 1, inner)
        out[weights].view(sizes).copy_(result)


def modulate_many_backward_out(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    layers: Tensor,
    tiles: Tensor | None,
    grad_weight: Tensor | None,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
) -> None:
    """grad_weight = gamma * grad, grad_gamma = sum over the taps of grad * weight, grad_beta = sum of grad."""
    wide = next(t.dtype for t in (grad_gamma, grad_beta, gamma) if t is not None)
    for weights, pairs, sizes, _ in _layers(layers):
        outer, _, inner = sizes
        values = grad[weights].view(sizes).to(wide)
        if grad_weight is not None and gamma is not None:
            grad_weight[weights].view(sizes).copy_(gamma[pairs].view(outer, 1, inner) * values)
        if grad_gamma is not None:
            grad_gamma[pairs].view(outer, inner).copy_((values * weight[weights].view(sizes).to(wide)).sum(1))
        if grad_beta is not None:
            grad_beta[pairs].view(outer, inner).copy_(values.sum(1))


def step_many(
    grad: Tensor,
    weight: Tensor,
    layers: Tensor,
    tiles: Tensor | None,
    hyper: Tensor,
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    out: Tensor | None,
) -> None:
    """Reduce, Adam (Kingma and Ba, ICLR 2015), average, then ``modulate_many_out`` with the new gamma and beta."""
    lr, beta1, beta2, eps, correction1, correction2, decay, _ = hyper.unbind()
    found = parameters.new_empty(parameters.shape)
    modulate_many_backward_out(grad, weight, None, layers, None, None, found[0], found[1])
    for _, pairs, _, flags in _layers(layers):
        for row, fixed in enumerate(_FIXED):
            p, m, v, d = (t[row, pairs] for t in (parameters, exp_avg, exp_avg_sq, found))
            if not flags & fixed:
                m.copy_(beta1 * m + (1.0 - beta1) * d)
                v.copy_(beta2 * v + (1.0 - beta2) * d * d)
                p.sub_(lr * (m * correction1) / ((v * correction2).sqrt() + eps))
            if average is not None:
                a = average[row, pairs]
                a.add_((1.0 - decay) * (p - a))
    if out is not None:
        modulate_many_out(weight, parameters[0], parameters[1], layers, tiles, out)


def _layers(layers: Tensor) -> Iterator[tuple[slice, slice, tuple[int, int, int], int]]:
    """Weights, pairs, ``(O, taps, I)`` and flags of each layer."""
    for weight, pair, outer, inner, taps, flags in layers.tolist():
        yield (
            slice(weight, weight + outer * inner * taps),
            slice(pair, pair + outer * inner),
            (outer, taps, inner),
            flags,
        )
