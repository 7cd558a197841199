"""A network pair on disk: a folder with ``model.json`` and one safetensors file for each network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import SourceError
from .architecture import Description
from .catalogue import describe

FORMAT = 1
_FILES = {name: f"{name}.safetensors" for name in ("generator", "discriminator", "average")}


@dataclass(frozen=True)
class SourcePair:
    """Description and weights of a pair. Floating-point weights are float32 (float64 where stored so)."""

    cfg: Description
    generator_state: dict[str, Tensor]
    discriminator_state: dict[str, Tensor] | None
    average_state: dict[str, Tensor] | None
    meta: dict[str, Any]


def save_pair(
    folder: str | Path,
    cfg: Description,
    generator: nn.Module | Mapping[str, Tensor],
    discriminator: nn.Module | Mapping[str, Tensor] | None,
    ema: nn.Module | Mapping[str, Tensor] | None = None,
    meta: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a pair that ``load_pair`` reads; ``model.json`` comes last, so a folder without it is unfinished.

    Args:
        generator, discriminator, ema: modules or state dictionaries; ``ema`` is the generator's weight average.
        meta: JSON values kept beside the description (command, data, seed, metrics ...).
        dtype: type the floating-point weights are stored in, e.g. ``torch.float16``; None keeps their own.

    Raises:
        ValueError: a weight is not finite in the stored type; nothing of that network is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)
    for name, network in (("generator", generator), ("discriminator", discriminator), ("average", ema)):
        path = folder / _FILES[name]
        if network is None:
            path.unlink(missing_ok=True)
            continue
        state = network.state_dict() if isinstance(network, nn.Module) else network
        _replace(path, lambda part, state=state, name=name: save_file(_stored(name, state, dtype), part))
    text = json.dumps({"format": FORMAT, "model": cfg.to_json(), "meta": dict(meta or {})}, indent=2) + "\n"
    _replace(folder / "model.json", lambda part: Path(part).write_text(text, encoding="utf-8"))
    return folder


def load_pair(path: str | Path) -> SourcePair:
    """Read a pair from its folder, or from any of the files in it.

    Raises:
        SourceError: the folder, its description or the generator is missing, unreadable or of a later format.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    description = folder / "model.json"
    if not description.is_file():
        raise SourceError(
            f"{folder} is not a source: it has no model.json; "
            "make one with `adafm pretrain` or, from a published checkpoint, with `adafm convert`"
        )
    cfg, meta = _read(description)
    states = {name: _load(folder / file) for name, file in _FILES.items()}
    if states["generator"] is None:
        raise SourceError(f"{folder} has no {_FILES['generator']}")
    return SourcePair(cfg, states["generator"], states["discriminator"], states["average"], meta)


def read_description(path: Path) -> Description:
    """The description in a pair's model.json.

    Raises:
        SourceError: it is unreadable or of a later format.
    """
    return _read(path)[0]


def _read(description: Path) -> tuple[Description, dict[str, Any]]:
    try:
        values = json.loads(description.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise SourceError(f"{description} is of format {values['format']}; this version reads format {FORMAT}")
        return describe(values["model"]), values.get("meta", {})
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{description} cannot be read: {type(error).__name__}: {error}") from error


def _stored(name: str, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    stored = {}
    for key, value in state.items():
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value if dtype is None else value.to(dtype)
            if not value.isfinite().all():
                raise ValueError(f"{name}.{key} is not finite as {value.dtype}; store it in a wider type")
        # A copy, so that no two entries share memory and channels-last weights are written row-major.
        stored[key] = value.clone(memory_format=torch.contiguous_format)
    return stored


def _load(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    narrow = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in narrow else value for name, value in state.items()}


def _replace(path: Path, write: Any) -> None:
    part = path.with_name(path.name + ".part")
    write(str(part))
    os.replace(part, path)
