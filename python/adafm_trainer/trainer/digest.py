"""SHA-256 over a state: nested mappings and sequences of tensors and plain values."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def state_digest(state: object) -> bytes:
    """32 bytes that are equal for equal states: same structure, types, shapes and bits.

    Mappings are taken in the order of their keys, so the order of insertion does not matter; the device and the memory
    layout of a tensor do not either.
    """
    sha = hashlib.sha256()
    _feed(sha, state)
    return sha.digest()


def _feed(sha: hashlib._Hash, value: object) -> None:
    if isinstance(value, dict):
        sha.update(f"mapping {len(value)}".encode())
        for key in sorted(value, key=str):
            sha.update(f"{type(key).__name__} {key} ".encode())
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        sha.update(f"sequence {len(value)}".encode())
        for item in value:
            _feed(sha, item)
    elif isinstance(value, Tensor):
        sha.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        sha.update(f"{type(value).__name__} {value!r} ".encode())
