"""Convolution whose second derivative is made of ordinary convolutions, none with a kernel the size of a feature map.

PyTorch's own double backward takes the weight's gradient by a convolution that has the whole output gradient as its
kernel. Here each derivative is one of three bilinear maps, and their derivatives are again among the three:

- C(x, w): the convolution.
- I(g, w): its gradient for the input; a transposed convolution.
- W(g, x): its gradient for the weight.

Idea: the custom convolution gradients of StyleGAN2-ADA (Karras et al., NeurIPS 2020). Each argument has a node of
its own in the graph, so the engine passes over the gradients that nobody asks for, by ``torch.autograd.grad`` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Rule = Callable[[Tensor, Tensor], Tensor]
_Pair = tuple[int, int]

_ACTIVE: ContextVar[bool] = ContextVar("explicit double backward", default=False)


@dataclass(frozen=True)
class _Geometry:
    """What fixes the three maps: sizes of input and weight, and the convolution's settings."""

    input: torch.Size
    weight: torch.Size
    stride: _Pair
    padding: _Pair
    dilation: _Pair
    groups: int

    def output_padding(self, output: torch.Size) -> list[int]:
        """Rows and columns of the input that the last window of a strided convolution does not reach."""
        return [
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, stride, padding, dilation, kernel in zip(
                self.input[2:], output[2:], self.stride, self.padding, self.dilation, self.weight[2:], strict=True
            )
        ]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | _Pair = 1,
    padding: int | _Pair = 0,
    dilation: int | _Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with explicit derivatives: the same values, gradients equal to rounding.

    ``input [B, I, H, W]``, ``weight [O, I / groups, KH, KW]``, ``bias [O]``; any layout. Under autocast the arguments
    are cast as PyTorch casts them (float64 stays), and gradients come back in their own types. Any order of
    differentiation in reverse mode; no forward mode, ``torch.func`` or ``torch.compile``.

    Raises:
        ValueError: ``input`` or ``weight`` is not of rank 4, or ``padding`` is a word.
    """
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}; expected [B, I, H, W] and "
            "[O, I / groups, KH, KW]"
        )
    if isinstance(padding, str):
        raise ValueError(f"padding is {padding!r}; give the number of rows and columns, such as 1 for a 3x3 kernel")
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        input, weight, bias = (
            t if t is None or t.dtype == torch.float64 else t.to(wanted) for t in (input, weight, bias)
        )
    geometry = _Geometry(input.shape, weight.shape, *map(_pair, (stride, padding, dilation)), groups)
    with torch.autocast(kind, enabled=False):
        return _convolution(input, weight, bias, geometry)


class ExplicitDoubleBackward(TorchFunctionMode):
    """Inside this context ``torch.nn.functional.conv2d``, whoever calls it, is the form of this module.

    Values and derivatives of every order are those of PyTorch's own, to rounding; autocast applies as it does there.
    Convolutions whose padding is a word (``same``, ``valid``) are left to PyTorch.
    """

    def __enter__(self) -> ExplicitDoubleBackward:
        self._token = _ACTIVE.set(True)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        _ACTIVE.reset(self._token)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.conv2d and not isinstance(_argument(args, kwargs, 4, "padding", 0), str):
            return conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def convolution_mode() -> AbstractContextManager:
    """A context that computes convolutions as they are computed here and now: for code that runs again later."""
    return ExplicitDoubleBackward() if _ACTIVE.get() else nullcontext()


def _convolution(x: Tensor, w: Tensor, bias: Tensor | None, at: _Geometry) -> Tensor:
    with torch.no_grad():
        value = torch.ops.aten.convolution(x, w, bias, at.stride, at.padding, at.dilation, False, (0, 0), at.groups)
    return _joined(
        value,
        (x, w, lambda g, w: _input_gradient(g, w, at)),
        (w, x, lambda g, x: _weight_gradient(g, x, at)),
        (bias, None, lambda g, _: g.sum((0, 2, 3))),
    )


def _input_gradient(g: Tensor, w: Tensor, at: _Geometry) -> Tensor:
    with torch.no_grad():
        value = torch.ops.aten.convolution(
            g, w, None, at.stride, at.padding, at.dilation, True, at.output_padding(g.shape), at.groups
        )
    return _joined(
        value,
        (g, w, lambda u, w: _convolution(u, w, None, at)),
        (w, g, lambda u, g: _weight_gradient(g, u, at)),
    )


def _weight_gradient(g: Tensor, x: Tensor, at: _Geometry) -> Tensor:
    with torch.no_grad():
        # Of the weight only the size is read, as in torch.nn.grad.conv2d_weight.
        like = g.new_empty(1).expand(at.weight)
        _, value, _ = torch.ops.aten.convolution_backward(
            g, x, like, None, at.stride, at.padding, at.dilation, False, (0, 0), at.groups, (False, True, False)
        )
    return _joined(
        value,
        (g, x, lambda v, x: _convolution(x, v, None, at)),
        (x, g, lambda v, g: _input_gradient(g, v, at)),
    )


class _Part(torch.autograd.Function):
    """``value``, whose gradient for ``argument`` is ``rule(gradient, other)``.

    ``other`` comes in a tuple, so that autograd sees no edge to it: what is asked of ``argument`` alone decides whether
    the rule runs. It is saved with its history, so the rule's result is differentiable in it.
    """

    @staticmethod
    def forward(ctx: Any, argument: Tensor, others: tuple[Tensor | None], rule: _Rule, value: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        ctx.rule = rule
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (other,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.rule(gradient, other), None, None, None


class _Join(torch.autograd.Function):
    """The first of several tensors that stand for the same value; the gradient goes to all of them."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.count = len(parts)
        return parts[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return (gradient,) * ctx.count


def _joined(value: Tensor, *arguments: tuple[Tensor | None, Tensor | None, _Rule]) -> Tensor:
    """``value`` with one node for each argument that takes part in a graph: (argument, the other one, its rule)."""
    wanted = [entry for entry in arguments if entry[0] is not None and entry[0].requires_grad]
    if not (wanted and torch.is_grad_enabled()):
        return value
    parts = []
    for argument, other, rule in wanted:
        # The value itself goes through one part; the others carry a stand-in of its shape that takes no memory.
        carried = value.new_empty(()).expand(value.shape) if parts else value
        parts.append(_Part.apply(argument, (other,), rule, carried))
    return parts[0] if len(parts) == 1 else _Join.apply(*parts)


def _pair(value: int | _Pair) -> _Pair:
    return (value, value) if isinstance(value, int) else tuple(value)


def _argument(args: tuple, kwargs: dict | None, position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else (kwargs or {}).get(name, default)
