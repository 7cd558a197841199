"""Inputs and the plain float64 formula for the tests of the modulation ops."""

import torch
from torch import Tensor


def normal(shape, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    """Normal numbers by seed, the same on every device and rounded to the type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def inputs(shape, dtype=torch.float32, device="cpu", seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """weight of ``shape``, gamma and beta of its two leading dimensions with trailing ones."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = (*shape[:2], *(1,) * (len(shape) - 2))
    return (
        normal(shape, dtype, device, seed),
        normal(pairs, wide, device, seed + 1),
        normal(pairs, wide, device, seed + 2),
    )


def spread(parameter: Tensor | None, weight: Tensor, default: float) -> Tensor:
    """A parameter of any accepted shape, in float64, ready to broadcast over the weight."""
    if parameter is None:
        return torch.full((1,) * weight.dim(), default, dtype=torch.float64, device=weight.device)
    return parameter.double().reshape(*parameter.shape[:2], *(1,) * (weight.dim() - 2))


def truth(weight: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """gamma * weight + beta in float64, without any op of the package."""
    return spread(gamma, weight, 1.0) * weight.double() + spread(beta, weight, 0.0)


def gradients(grad: Tensor, weight: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dW, and dgamma and dbeta over [O, I], in float64."""
    wide, taps = grad.double(), tuple(range(2, weight.dim()))
    product = wide * weight.double()
    return (
        spread(gamma, weight, 1.0) * wide,
        product.sum(taps) if taps else product,
        wide.sum(taps) if taps else wide,
    )


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[tensor.dim()])


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values lying in memory in different ways."""
    flat = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    offset = flat[3:].view(tensor.shape).copy_(tensor)
    wide = torch.empty((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype, device=tensor.device)
    strided = wide[..., ::2].copy_(tensor)
    swapped = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    found = {"contiguous": tensor.contiguous(), "offset": offset, "strided": strided, "swapped": swapped}
    if tensor.dim() in (4, 5):
        found["channels_last"] = channels_last(tensor)
    return found


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def assert_forward(found, weight, gamma, beta, result, truncates):
    """Every entry within one rounding of the result's type and two of the computation."""
    expected = truth(weight, gamma, beta)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    terms = (spread(gamma, weight, 1.0) * weight.double()).abs() + spread(beta, weight, 0.0).abs()
    store = 0.0 if result == torch.float64 else unit(result) * (1.0 if truncates and result == torch.bfloat16 else 0.5)
    allowed = store * 1.01 * expected.abs() + unit(wide) * terms + torch.finfo(result).tiny
    assert found.dtype == result
    assert ((found.double() - expected).abs() <= allowed).all()
