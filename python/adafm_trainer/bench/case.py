"""A benchmark case: ways to compute the same thing, what it should be, and how many bytes it has to move."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .baselines import COMPILE, cannot_compile, compiled
from .measure import COPY, Method

# Makes what is measured of a call of a compiled function.
Use = Callable[[Callable[[], Any]], Callable[[], Any]]


class CheckError(Exception):
    """A result is wrong: nothing is timed."""


@dataclass
class Compiling:
    """torch.compile among the ways to compute a case, as long as less than ``limit`` seconds went into compiling."""

    device: str
    limit: float = math.inf
    spent: float = 0.0
    left_out: str | None = None

    def method(self, name: str, function: Callable, *arguments, use: Use | None = None) -> list[Method]:
        """The compiled function, or what ``use`` makes of its call, called once already; nothing where compiling is
        left out, and then why is kept."""
        if reason := cannot_compile(self.device):
            self.left_out = reason
        elif self.spent >= self.limit:
            self.left_out = f"limited to {self.limit:g} s of compiling"
        else:
            start, fast = time.monotonic(), compiled(function)
            run = lambda: fast(*arguments)  # noqa: E731
            run = run if use is None else use(run)
            run()
            self.spent += time.monotonic() - start
            return [Method(name, run)]
        return []


@dataclass(frozen=True)
class Setup:
    """What to build cases for; ``quick``: small, for tests; ``seconds``: after which no further case is begun."""

    device: str
    quick: bool
    compiling: Compiling
    seconds: float = math.inf

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends beside the compiled one that are measured on this device."""
        return ("triton",) if self.device == "cuda" else ()

    def compiled_method(
        self, function: Callable, *arguments, name: str = COMPILE, use: Use | None = None
    ) -> list[Method]:
        """``function(*arguments)`` under torch.compile, where that is among the ways; with ``use`` what it makes of
        the call, such as the backward pass, is measured instead."""
        return self.compiling.method(name, function, *arguments, use=use)


@dataclass
class Case:
    """``row`` names a row of the table, ``shape`` the weight; ``methods[0]`` is ours.

    ``expected`` gives the float64 result, one tensor for each tensor of a result; ``units`` is the error allowed, in
    units of the last place at the largest entry.
    """

    row: str
    shape: str
    moved: int
    methods: list[Method]
    expected: Callable[[], Sequence[Tensor]]
    units: float = 1.0
    mean: bool = False

    def check(self) -> None:
        """Raise CheckError unless every way to compute the case, but the copy, gives what is expected."""
        expected = [tensor.double() for tensor in self.expected()]
        scales = [tensor.abs().max().item() for tensor in expected]
        for method in self.methods:
            if method.name == COPY:
                continue
            returned = method.run()
            found = list(_flat(returned if method.result is None else method.result()))
            if len(found) != len(expected):
                raise CheckError(f"{self.name}, {method.name}: {len(found)} tensors, expected {len(expected)}")
            for tensor, truth, scale in zip(found, expected, scales, strict=True):
                error = (tensor.detach().reshape(truth.shape).double() - truth).abs().max().item()
                allowed = self.units * torch.finfo(tensor.dtype).eps * scale
                if not error <= allowed:
                    raise CheckError(f"{self.name}, {method.name}: off by {error:.3g}, allowed are {allowed:.3g}")

    @property
    def name(self) -> str:
        return f"{self.row} {self.shape}"


def _flat(result) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result
