"""One or several layers in flat buffers, as the whole-network ops take them and `ModulationPlan` holds them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adafm_kernels import backends
from adafm_kernels._library import load_library

from .shapes import Shape


class Arena:
    """Random weights (channels-last), gamma and beta of layers ``[O, I, kh, kw]``, one behind the other.

    Every layer begins at a multiple of eight elements. ``views`` gives the layers of any buffer of the weights' size as
    channels-last tensors, ``pair_views`` those of a buffer of gamma's size as ``[O, I, 1, 1]``.
    """

    def __init__(self, shapes: Sequence[Shape], device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.shapes, self.device, self.dtype = list(shapes), device, dtype
        rows, weights, pairs = [], 0, 0
        for outer, inner, height, width in self.shapes:
            rows.append((weights, pairs, outer, inner, height * width, 0))
            weights += _padded(outer * inner * height * width)
            pairs += _padded(outer * inner)
        self.rows, self.size, self.pairs = rows, weights, pairs
        self.layers = torch.tensor(rows, dtype=torch.int64)
        self.tiles = _tiles(rows).to(device) if device == "cuda" else None
        self._generator = torch.Generator(device).manual_seed(seed)
        self.weight = self.random(dtype)
        self.gamma, self.beta = self.random_pairs(), self.random_pairs()

    @property
    def weights(self) -> int:
        """Weights without the padding."""
        return sum(row[2] * row[3] * row[4] for row in self.rows)

    @property
    def filters(self) -> int:
        """(o, i) pairs without the padding."""
        return sum(row[2] * row[3] for row in self.rows)

    def random(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(self.size, generator=self._generator, device=self.device).to(dtype)

    def random_pairs(self) -> Tensor:
        return torch.randn(self.pairs, generator=self._generator, device=self.device)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """A buffer of the weights' size that holds NaN, so that what an op leaves out shows."""
        return torch.full((self.size,), float("nan"), dtype=dtype, device=self.device)

    def empty_pairs(self) -> Tensor:
        return torch.full((self.pairs,), float("nan"), device=self.device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        found = []
        for (start, *_), (outer, inner, height, width) in zip(self.rows, self.shapes, strict=True):
            strides = (inner * height * width, 1, inner * width, inner)
            found.append(buffer.as_strided((outer, inner, height, width), strides, buffer.storage_offset() + start))
        return found

    def pair_views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[pair : pair + outer * inner].view(outer, inner, 1, 1) for _, pair, outer, inner, *_ in self.rows]

    def parameters(self, requires_grad: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """gamma and beta of every layer as tensors of their own, ``[O, I, 1, 1]``."""
        found = ([view.clone() for view in self.pair_views(buffer)] for buffer in (self.gamma, self.beta))
        gammas, betas = ([tensor.requires_grad_(requires_grad) for tensor in tensors] for tensors in found)
        return gammas, betas


def arena_op(name: str, backend: str, device: str) -> Callable:
    """A whole-network op of one backend, resolved once, without the checks of ``torch.ops.adafm``."""
    if backend == "compiled":
        load_library()
        return getattr(torch.ops.adafm_compiled, name).default
    return getattr(backends.implementation(torch.device(device), backend), name)


def _padded(count: int) -> int:
    return -(-count // 8) * 8


def _tiles(rows: list[tuple[int, ...]]) -> Tensor:
    planned = importlib.import_module("adafm_kernels._C").plan_tiles(rows)
    return torch.frombuffer(bytearray(planned), dtype=torch.int32).view(-1, 4)
