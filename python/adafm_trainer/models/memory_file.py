"""The file of a bank of GAN memory: ``bank.safetensors`` in a folder, its description as JSON in the header.

Tensors are named ``<number of the task>.<network>.<parameter>``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SourceError

FORMAT = 1
FILE = "bank.safetensors"
_KEY = "gan_memory"


def write_bank(folder: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Path:
    """Write the file as a whole in place of the one before, which a crash leaves as it was; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / FILE, folder / f"{FILE}.part"
    save_file(dict(tensors), part, metadata={_KEY: json.dumps({"format": FORMAT, **description})})
    os.replace(part, path)
    return path


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the file, on the CPU."""
    with safe_open(Path(folder) / FILE, "pt") as stream:
        for key in stream.keys():
            yield key, stream.get_tensor(key)


def describe_bank(folder: str | Path) -> dict[str, Any]:
    """A bank's description without its tensors: ``source_sha256``, ``model``, ``next_model`` (with the components that
    the next task starts from), ``storage``, and ``tasks`` with ``name`` and ``bytes`` by network.

    Raises:
        SourceError: there is no bank, it cannot be read, or it is of a later format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise SourceError(f"{path.parent} is not a bank of GAN memory: it has no {FILE}")
    try:
        with safe_open(path, "pt") as stream:
            description = json.loads((stream.metadata() or {})[_KEY])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise SourceError(f"{path} cannot be read as a bank: {type(error).__name__}: {error}") from error
    if description.get("format") != FORMAT:
        raise SourceError(f"{path} is of format {description.get('format')}; this version reads format {FORMAT}")
    return description


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bits of a state, in the order of the names; layout does not matter."""
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
