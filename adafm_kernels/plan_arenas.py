"""The buffers of a ``ModulationPlan``: where each layer lies in them, and the calls that read and write them."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends

Triple = tuple[Tensor, Tensor | None, Tensor | None]

_ALIGNMENT = 8  # elements: every layer begins at a 16-byte boundary in every type


@dataclass(frozen=True)
class Slot:
    """Where one layer lies in the arenas, and the shapes it had when the plan was made."""

    name: str
    shape: torch.Size
    gamma_shape: torch.Size | None
    beta_shape: torch.Size | None
    weight: int
    pair: int
    pairs: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.shape[2:].numel()

    def weight_view(self, arena: Tensor) -> Tensor:
        """The layer's part of a weight arena, in the weight's own shape, channels-last."""
        inner, sides = self.pairs[1], self.shape[2:]
        strides, step = [], inner
        for side in reversed(sides):
            strides.append(step)
            step *= side
        if len(self.shape) == 1:
            return arena[self.weight : self.weight + inner]
        return arena.as_strided(self.shape, (step, 1, *reversed(strides)), arena.storage_offset() + self.weight)

    def pair_view(self, arena: Tensor, shape: torch.Size | None = None) -> Tensor:
        """The layer's part of one row of a pair arena: ``[O, I]``, or a full shape with trailing ones."""
        count = self.pairs[0] * self.pairs[1]
        return arena[self.pair : self.pair + count].view(self.pairs if shape is None else shape)


class Arenas:
    """The buffers of a plan on one device and in one set of types."""

    def __init__(
        self,
        slots: list[Slot],
        flags: list[int],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        accumulate: torch.dtype | None,
        device: torch.device,
        backend: str,
    ) -> None:
        weights = padded(slots[-1].weight + slots[-1].shape.numel())
        pairs = padded(slots[-1].pair + slots[-1].pairs[0] * slots[-1].pairs[1])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.backend, self.flags = backend, flags
        self.weight = torch.zeros(weights, dtype=dtype, device=device)
        self.parameters = torch.zeros(2, pairs, dtype=wide, device=device)
        self.parameters[0].fill_(1.0)
        self.grad_parameters = torch.zeros(2, pairs, dtype=wide, device=device)
        self.out = torch.zeros(weights, dtype=out_dtype, device=device)
        self.grad = torch.zeros(weights, dtype=accumulate or out_dtype, device=device)
        self.grad_weight = torch.zeros(0, dtype=dtype, device=device)
        rows = [(slot.weight, slot.pair, *slot.pairs, slot.taps, flag) for slot, flag in zip(slots, flags, strict=True)]
        self.layers = torch.tensor(rows, dtype=torch.int64)
        self.tiles = _tiles(rows, device) if device.type == "cuda" or backend == "triton" else None
        self.versions: tuple[int, ...] = ()
        self.copied: dict[tuple[int, int], int] = {}
        self.leaves = [slot.weight_view(self.out).detach().requires_grad_() for slot in slots]
        self.grads = [
            _Gradient(leaf, slot.weight_view(self.grad)) for leaf, slot in zip(self.leaves, slots, strict=True)
        ]

    @torch.no_grad()
    def link(self, slots: list[Slot], tensors: list[Triple]) -> None:
        """Copy the parameters in and make them views of the arenas where their form allows it."""
        taken: set[int] = set()
        for number, (slot, triple) in enumerate(zip(slots, tensors, strict=True)):
            for part, parameter in enumerate(triple):
                if parameter is None:
                    continue
                view = self.view(slot, part, parameter.shape)
                whole = parameter.shape == view.shape and parameter.dtype == view.dtype
                view.copy_(parameter)
                if whole and id(parameter) not in taken:
                    parameter.data = view
                    taken.add(id(parameter))
                else:
                    self.copied[number, part] = parameter._version

    def view(self, slot: Slot, part: int, shape: torch.Size) -> Tensor:
        """The place of a weight (part 0), gamma (1) or beta (2), in ``shape`` where that is one of all pairs."""
        if part == 0:
            return slot.weight_view(self.weight)
        row = self.parameters[part - 1]
        whole = shape.numel() == slot.pairs[0] * slot.pairs[1]
        return slot.pair_view(row, shape if whole else torch.Size((*slot.pairs, *(1,) * (len(shape) - 2))))

    def is_linked(self, slots: list[Slot], tensors: list[Triple]) -> bool:
        bases = (self.weight, self.parameters[0], self.parameters[1])
        starts = [base.data_ptr() for base in bases]
        for number, (slot, triple) in enumerate(zip(slots, tensors, strict=True)):
            for part, parameter in enumerate(triple):
                if parameter is None:
                    continue
                if (number, part) in self.copied:
                    if parameter.device != self.weight.device or parameter.shape != _expected(slot, part):
                        return False
                    continue
                base = bases[part]
                offset = (slot.pair if part else slot.weight) * base.element_size()
                if parameter.data_ptr() != starts[part] + offset or parameter.dtype != base.dtype:
                    return False
                if parameter.shape != _expected(slot, part):
                    return False
        return True

    @torch.no_grad()
    def copy_in(self, slots: list[Slot], tensors: list[Triple], force: bool) -> None:
        """Bring in the parameters that are no views, where they have changed."""
        for (number, part), version in self.copied.items():
            parameter = tensors[number][part]
            assert parameter is not None
            if force or parameter._version != version:
                self.view(slots[number], part, parameter.shape).copy_(parameter)
                self.copied[number, part] = parameter._version

    def modulate(self) -> None:
        gamma, beta = self.parameters[0], self.parameters[1]
        self.ops.modulate_many_out(self.weight, gamma, beta, self.layers, self.tiles, self.out)
        torch.autograd.graph.increment_version(self.out)

    def reduce(self, with_weight: bool) -> None:
        """The gradients of gamma and beta, and of the weights where ``with_weight``, from that of W'."""
        self._settle()
        if with_weight and self.grad_weight.numel() == 0:
            self.grad_weight = torch.zeros_like(self.weight)
        gamma, beta = self.grad_parameters[0], self.grad_parameters[1]
        grad_weight = self.grad_weight if with_weight else None
        self.ops.modulate_many_backward_out(
            self.grad, self.weight, self.parameters[0], self.layers, self.tiles, grad_weight, gamma, beta
        )

    def step(self, hyper: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, average: Tensor | None) -> None:
        self._settle()
        self.ops.step_many(
            self.grad,
            self.weight,
            self.layers,
            self.tiles,
            hyper,
            self.parameters,
            exp_avg,
            exp_avg_sq,
            average,
            self.out,
        )
        torch.autograd.graph.increment_version(self.out)

    @property
    def ops(self) -> Any:
        return backends.implementation(self.weight.device, self.backend)

    def zero_grad(self) -> None:
        for grad in self.grads:
            grad.forget()

    def _settle(self) -> None:
        for grad in self.grads:
            grad.settle()

    def capturing(self) -> bool:
        return self.weight.is_cuda and torch.cuda.is_current_stream_capturing()

    def nbytes(self) -> dict[str, int]:
        names = ("weight", "parameters", "grad_parameters", "out", "grad", "grad_weight")
        return {name: getattr(self, name).numel() * getattr(self, name).element_size() for name in names}


def padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _expected(slot: Slot, part: int) -> torch.Size | None:
    return (slot.shape, slot.gamma_shape, slot.beta_shape)[part]


def _tiles(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    packed = bytearray(importlib.import_module("adafm_kernels._C").plan_tiles(rows))
    return torch.frombuffer(packed, dtype=torch.int32).view(-1, 4).to(device)


class _Gradient:
    """The gradient of one W': its part of the arena, which the first backward writes and the further ones add to.

    Nothing is written to be overwritten: zeros come only into the place of a W' that no backward reached, and only when
    the arena is about to be read. Where the arena has the type of W', ``leaf.grad`` is the part of the arena once it is
    written, and a gradient that somebody else put there is taken over; in another type ``leaf.grad`` stays None.
    """

    __slots__ = ("_leaf", "_part", "_same", "_written")

    def __init__(self, leaf: Tensor, part: Tensor) -> None:
        self._leaf, self._part = weakref.proxy(leaf), part
        self._same, self._written = part.dtype == leaf.dtype, False
        leaf.register_post_accumulate_grad_hook(self._take)

    def forget(self) -> None:
        self._leaf.grad, self._written = None, False

    def settle(self) -> None:
        """Bring the part of the arena up to date."""
        if self._leaf.grad is not None:
            self._take(self._leaf)
        if not self._written:
            self._part.zero_()

    @torch.no_grad()
    def _take(self, leaf: Tensor) -> None:
        found = leaf.grad
        if not self._same and self._written:
            self._part.add_(found)
        elif not self._same or found.data_ptr() != self._part.data_ptr():
            self._part.copy_(found)
        leaf.grad, self._written = self._part if self._same else None, True
