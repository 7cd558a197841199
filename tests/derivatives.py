"""What the tests of every op's derivatives share: numeric checks, and agreement with a plain formula to any order."""

from collections.abc import Callable, Sequence

import torch
from modulation import normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode


class Record(TorchDispatchMode):
    """The calls of the package's ops, below autograd."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "adafm":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [func._schema.name.removeprefix("adafm::") for func, _ in self.calls]


def leaves(*shapes, device="cpu", dtype=torch.float64, seed=0) -> tuple[Tensor, ...]:
    """A tensor for each shape, asking for gradients."""
    return tuple(normal(shape, dtype, device, seed + n).requires_grad_() for n, shape in enumerate(shapes))


def check(call: Callable, points: Sequence[Tensor], target) -> None:
    """First and second derivatives against differences, in float64; Triton's interpreter by random directions."""
    fast = target.backend == "triton"
    assert gradcheck(call, points, fast_mode=fast)
    assert gradgradcheck(call, points, fast_mode=fast)


def chain(call: Callable, points: Sequence[Tensor], seed: int = 50) -> list[Tensor | None]:
    """Values of ``call``, gradients of a quadratic form of them, and gradients of a quadratic form of those.

    Incoming gradients then depend on the points too, as they do behind a network.
    """
    values = call(*points)
    values = (values,) if isinstance(values, Tensor) else tuple(values)
    first = torch.autograd.grad(_form(values, seed), points, create_graph=True, allow_unused=True)
    second = torch.autograd.grad(_form(first, seed + 20), points, allow_unused=True)
    return [*values, *first, *second]


def _form(tensors: Sequence[Tensor | None], seed: int) -> Tensor:
    terms = [
        (t.square() * normal(t.shape, t.dtype, t.device, seed + n) + t).sum()
        for n, t in enumerate(tensors)
        if t is not None
    ]
    return sum(terms[1:], start=terms[0])


def assert_agree(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float = 1e-9) -> None:
    """Every tensor within ``tolerance`` of the largest entry of the expected one; None counts as zero."""
    assert len(found) == len(expected)
    for number, (have, want) in enumerate(zip(found, expected, strict=True)):
        if have is None or want is None:
            rest = want if have is None else have
            assert rest is None or not rest.any(), number
            continue
        assert have.shape == want.shape, number
        largest = want.abs().max().item() if want.numel() else 0.0
        assert torch.allclose(have, want, rtol=tolerance, atol=tolerance * largest), number
