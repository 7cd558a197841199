"""A golden file whose reads are recorded, and the comparison of computed tensors with its expected ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

INPUT_PREFIXES = ("in.", "state.")
# (relative, absolute) by the expected tensor's dtype: |a - b| <= relative * max|b| + absolute, everywhere.
TOLERANCES = {torch.float64: (1e-9, 1e-13), torch.float32: (5e-4, 1e-7)}
# Files of these names: values in float64 from float32 inputs, some of them gradients that are zero but for rounding.
ROUNDED = ("minegan_", "biggan_")
ROUNDED_TOLERANCES = {torch.float64: (1e-9, 1e-10), torch.float32: (5e-4, 1e-7)}
# A tensor that is larger than this is compared so that a change of 1 % is always seen, whatever the absolute term.
SENSITIVE_ABOVE, SENSITIVITY = 1e-6, 5e-3


class GoldenFile:
    """Tensors and metadata of one file; ``config`` has its sizes. ``unread`` lists the inputs no case has asked for."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            self.tensors = {key: stream.get_tensor(key) for key in stream.keys()}
        self.path, self.metadata, self.config = path, metadata, json.loads(metadata.get("config", "{}"))
        self.tolerances = ROUNDED_TOLERANCES if path.name.startswith(ROUNDED) else TOLERANCES
        self._read: set[str] = set()

    @property
    def expected(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.tensors.items() if not key.startswith(INPUT_PREFIXES)}

    @property
    def unread(self) -> list[str]:
        return [key for key in self.tensors if key.startswith(INPUT_PREFIXES) and key not in self._read]

    def get(self, key: str) -> Tensor:
        """One input as a fresh tensor."""
        self._read.add(key)
        return self.tensors[key].clone()

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All inputs under ``prefix``, which is taken off their keys."""
        return {key.removeprefix(prefix): self.get(key) for key in self.tensors if key.startswith(prefix)}

    def sequence(self, prefix: str) -> list[Tensor] | None:
        """Inputs ``prefix0``, ``prefix1``, ... in order; None if there is none."""
        found = self.under(prefix)
        return [found[str(i)] for i in range(len(found))] if found else None


def differences(
    expected: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    tolerances: Mapping[torch.dtype, tuple[float, float]] = TOLERANCES,
) -> list[str]:
    """One line for every expected tensor that is not computed, of another shape, or outside its tolerance."""
    problems = []
    for key, want in expected.items():
        if key not in actual:
            problems.append(f"{key}: nothing computes this key")
            continue
        have = actual[key].detach()
        if have.shape != want.shape:
            problems.append(f"{key}: shape {tuple(have.shape)}, expected {tuple(want.shape)}")
        elif not want.is_floating_point():
            if not torch.equal(have.to(want.dtype), want):
                problems.append(f"{key}: differs")
        elif want.numel():
            error, allowed = (have.double() - want.double()).abs().max().item(), allowance(want, tolerances)
            if not error <= allowed:
                problems.append(f"{key}: off by {error:.3e}, allowed {allowed:.3e}")
    return problems


def allowance(want: Tensor, tolerances: Mapping[torch.dtype, tuple[float, float]] = TOLERANCES) -> float:
    """Largest admissible absolute error of a computed ``want``."""
    relative, absolute = tolerances[want.dtype]
    largest = want.abs().max().item()
    allowed = relative * largest + absolute
    return min(allowed, SENSITIVITY * largest) if largest > SENSITIVE_ABOVE else allowed
