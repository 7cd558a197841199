"""Modulated weights and the layers' functions, arguments as in ``torch.nn.functional``, then gamma and beta.

AdaFM (Zhao, Cong and Carin, "On Leveraging Pretrained GANs for Generation with Limited Data", ICML 2020, section 3.2):
``W'[o, i] = gamma[o, i] * W[o, i] + beta[o, i]``, gamma and beta spread over the kernel; the bias is not modulated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _arguments, _ops, backends

_Size = int | tuple[int, ...]


def modulate(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    """``gamma * weight + beta``, gamma and beta spread over the kernel dimensions.

    Equivalent to ``(gamma[:, :, None, None] * weight + beta[:, :, None, None]).to(dtype)`` for a 2-D convolution.

    Args:
        weight: ``[O, I, *K]`` with no to three kernel dimensions; float32, float64, float16 or bfloat16; any strides.
        gamma: ``[O, I]``, ``[O, 1]`` or ``[1, I]`` with any number of trailing ones, or None for one everywhere.
        beta: as gamma; None for zero everywhere.
        dtype: type of the result. None: autocast's type where autocast is active on the weight's device (a float64
            weight keeps its type, as everywhere under autocast), else the weight's.
        memory_format: ``torch.contiguous_format``, ``torch.channels_last`` (rank 4), ``torch.channels_last_3d``
            (rank 5); None: the weight's layout, contiguous where the weight is not dense.
        backend: "reference", "compiled" or "triton"; None: see ``adafm_kernels.which_backend``.

    Returns:
        A fresh tensor of the weight's shape. Computed in float32 (float64 for a float64 weight) whatever the types,
        also under autocast, and cast once.

    Gradients come back in the shape and dtype of each argument. Differentiable any number of times, under
    ``torch.func.grad``, ``vmap`` and ``torch.compile(fullgraph=True)``; forward mode raises.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating-point type.
        ValueError: rank, shape, device, layout or backend name do not fit.
        RuntimeError: the backend is not there; the message says how to get it.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; expected a torch.Tensor")
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        if parameter is not None and not isinstance(parameter, Tensor):
            raise TypeError(f"{name} is a {type(parameter).__name__}; expected a torch.Tensor or None")
    if dtype is None:
        dtype = result_type(weight)
    if backend is None:
        backend = backends.forced_backend()
    return _ops.modulate(weight, gamma, beta, dtype, memory_format, backend)


def result_type(weight: Tensor) -> torch.dtype:
    """Autocast's type where it is active on the weight's device (float64 stays), else the weight's."""
    kind = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def adafm_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
    groups: int = 1,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with the weight ``gamma * weight + beta``.

    ``weight`` is ``[O, I / groups, KH, KW]``; gamma and beta as in ``modulate``, indexed by its two leading
    dimensions. The modulated weight is produced in the convolution's own type (autocast's, where active) and layout
    (channels-last where the input is). Differentiable as often as the convolution is.
    """
    modulated = modulated_weight(input, weight, gamma, beta, backend)
    return F.conv2d(input, modulated, bias, stride, padding, dilation, groups)


def adafm_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.conv_transpose2d`` with the weight ``gamma * weight + beta``.

    ``weight`` is ``[in, out / groups, KH, KW]`` as torch stores it; gamma and beta are indexed by its own two leading
    dimensions, so gamma is ``[in, out / groups]``.
    """
    modulated = modulated_weight(input, weight, gamma, beta, backend)
    return F.conv_transpose2d(input, modulated, bias, stride, padding, output_padding, groups, dilation)


def adafm_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.linear`` with the weight ``gamma * weight + beta``; all of them ``[O, I]``.

    With gamma and beta ``[O, 1]`` this is the modulation of fully connected layers in GAN memory (Cong et al.,
    NeurIPS 2020), which stores them as ``(1, O)``.
    """
    _check_input(input, weight)
    return F.linear(input, modulate(weight, gamma, beta, backend=backend), bias)


def modulated_weight(
    input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, backend: str | None = None
) -> Tensor:
    """The modulated weight of a convolution of ``input``: channels-last where the input is, else in W's layout."""
    _check_input(input, weight)
    layout = torch.channels_last if input.dim() == 4 and _arguments.is_channels_last(input) else None
    return modulate(weight, gamma, beta, memory_format=layout, backend=backend)


def _check_input(input: Tensor, weight: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input is a {type(input).__name__}; expected a torch.Tensor")
    if isinstance(weight, Tensor) and input.device != weight.device:
        raise ValueError(f"input is on {input.device} and weight on {weight.device}; move both to one device")
