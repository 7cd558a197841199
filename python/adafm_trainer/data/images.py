"""Image sets held as 8-bit tensors: loading, checking, selecting, and the manifest that identifies a set."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adafm_trainer.data.decode import BadImage, DecodeSettings, decode
from adafm_trainer.data.sources import FileSource, open_source
from adafm_trainer.errors import DataError

MEMORY_LIMIT = 4 * 2**30
MAX_BAD_SHARE = 0.05
_BLOCK = 512
_LISTED = 20


class _Resident:
    """All pixels in one tensor."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        return self.pixels[indices]

    def select(self, indices: torch.Tensor) -> _Resident:
        return _Resident(self.pixels[indices])


class _OnDemand:
    """Files decoded when asked for; the most recent are kept up to a number of bytes."""

    def __init__(self, source: FileSource, names: list[str], settings: DecodeSettings, limit: int) -> None:
        self._source, self._names, self._settings, self._limit = source, names, settings, limit
        self._recent: OrderedDict[str, np.ndarray] = OrderedDict()
        self._keep = max(1, limit // (settings.channels * settings.size**2))

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        shape = (len(indices), self._settings.channels, self._settings.size, self._settings.size)
        batch = np.empty(shape, np.uint8)
        for row, index in enumerate(indices.tolist()):
            batch[row] = self._one(self._names[index])
        return torch.from_numpy(batch)

    def _one(self, name: str) -> np.ndarray:
        if name in self._recent:
            self._recent.move_to_end(name)
            return self._recent[name]
        try:
            pixels = decode(self._source.read(name), self._settings).pixels
        except (BadImage, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"image {name!r} was readable when the set was loaded and is not now: {error}") from error
        self._recent[name] = pixels
        if len(self._recent) > self._keep:
            self._recent.popitem(last=False)
        return pixels

    def select(self, indices: torch.Tensor) -> _OnDemand:
        return _OnDemand(self._source, [self._names[i] for i in indices.tolist()], self._settings, self._limit)


class ImageSet:
    """A checked, ordered set of equally sized images.

    Attributes: ``names`` (relative file names), ``manifest`` (a dictionary ready for JSON: the settings, one record per
    image with name, width, height, mode and SHA-256 of the file, the rejected files with reasons, and one SHA-256 over
    names, files and settings). Made by ``load_image_set``.
    """

    def __init__(self, names: list[str], store: _Resident | _OnDemand, manifest: dict) -> None:
        self.names, self.manifest, self._store = names, manifest, store

    def __len__(self) -> int:
        return len(self.names)

    @property
    def in_memory(self) -> bool:
        return isinstance(self._store, _Resident)

    @property
    def pixels(self) -> torch.Tensor:
        """All images, uint8 ``[N, C, H, W]``. Raises RuntimeError for a set too large for memory; use ``batch``."""
        if not isinstance(self._store, _Resident):
            raise RuntimeError(
                f"these {len(self)} images are decoded on demand, because together they exceed the memory limit: "
                "take them with batch(indices), or load the set with a higher memory_limit"
            )
        return self._store.pixels

    def batch(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """The images at ``indices`` (repeats allowed), uint8 ``[len(indices), C, H, W]``, a fresh tensor."""
        return self._store.take(self._checked(indices))

    def select(self, indices: torch.Tensor | Sequence[int]) -> ImageSet:
        """The set of the images at ``indices``, in that order and each at most once, with a manifest of its own."""
        chosen = self._checked(indices)
        rows = chosen.tolist()
        if not rows or len(set(rows)) != len(rows):
            raise ValueError(f"select needs at least one index and none twice, got {len(rows)} indices")
        records = [self.manifest["images"][i] for i in rows]
        manifest = {**self.manifest, "count": len(rows), "images": records, "selected_from": self.manifest["sha256"]}
        manifest["duplicates"] = _duplicates(records)
        manifest["sha256"] = _fingerprint(manifest)
        return ImageSet([self.names[i] for i in rows], self._store.select(chosen), manifest)

    def _checked(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        rows = torch.as_tensor(indices, dtype=torch.int64).flatten().cpu()
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"indices run from {int(rows.min())} to {int(rows.max())}, the set has {len(self)} images")
        return rows


@dataclass(frozen=True)
class _Row:
    name: str
    pixels: np.ndarray | None
    record: dict
    reason: str | None


def load_image_set(
    path: str | Path,
    *,
    size: int,
    channels: int = 3,
    fit: str = "crop",
    alpha: str = "white",
    resample: str = "lanczos",
    max_pixels: int = 64_000_000,
    max_bad_share: float = MAX_BAD_SHARE,
    memory_limit: int = MEMORY_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Reads every image below a folder or in a zip, in order of its name, as uint8 ``[channels, size, size]``.

    fit: "crop", "pad" or "stretch"; alpha: "white", "black", "drop" or "error"; resample: "lanczos", "bilinear" (what
    the authors used) or "bicubic"; see ``DecodeSettings``. Rotation marks of cameras are obeyed; grey, palette, CMYK
    and 16-bit files are converted. A file that cannot serve is set aside with its reason in ``manifest["rejects"]``.
    Decoded once into memory where the set needs at most ``memory_limit`` bytes, otherwise on demand.
    ``progress(done, total)`` is called now and then. Raises DataError where there is no image, or where more than
    ``max_bad_share`` of the files were set aside.
    """
    path = Path(path)
    settings = DecodeSettings(size, channels, fit, alpha, resample, max_pixels)
    source = open_source(path)
    keep = len(source.names) * channels * size**2 <= memory_limit

    names: list[str] = []
    records: list[dict] = []
    rejects: list[dict] = []
    pixels = np.empty((len(source.names) if keep else 0, channels, size, size), np.uint8)
    # Pillow warns about damaged metadata and large sizes; what matters of that is in the rejects. The filter is set
    # here, outside the worker threads, because it belongs to the whole process.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for row in _decode_all(source, settings, progress):
            if row.reason is not None:
                rejects.append({"name": row.name, "reason": row.reason})
                continue
            if keep:
                pixels[len(names)] = row.pixels
            names.append(row.name)
            records.append(row.record)
    _check_rejects(path, len(source.names), rejects, max_bad_share)

    manifest = {
        "path": str(path),
        "kind": source.kind,
        "count": len(names),
        "settings": settings.to_json(),
        "ignored": source.ignored,
        "duplicates": _duplicates(records),
        "enlarged": sum(min(r["width"], r["height"]) < size for r in records),
        "rejects": rejects,
        "images": records,
    }
    manifest["sha256"] = _fingerprint(manifest)
    if keep:
        return ImageSet(names, _Resident(torch.from_numpy(pixels[: len(names)])), manifest)
    return ImageSet(names, _OnDemand(source, names, settings, memory_limit), manifest)


def _decode_all(
    source: FileSource, settings: DecodeSettings, progress: Callable[[int, int], None] | None
) -> Iterable[_Row]:
    total = len(source.names)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, total, _BLOCK):
            names = source.names[start : start + _BLOCK]
            yield from pool.map(lambda name: _decode_one(source, name, settings), names)
            if progress is not None:
                progress(min(start + _BLOCK, total), total)


def _decode_one(source: FileSource, name: str, settings: DecodeSettings) -> _Row:
    try:
        data = source.read(name)
        image = decode(data, settings)
    except BadImage as error:
        return _Row(name, None, {}, str(error))
    except (OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return _Row(name, None, {}, f"cannot be read: {error}")
    record = {
        "name": name,
        "width": image.width,
        "height": image.height,
        "mode": image.mode,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return _Row(name, image.pixels, record, None)


def _check_rejects(path: Path, total: int, rejects: list[dict], max_bad_share: float) -> None:
    if len(rejects) <= max_bad_share * total and len(rejects) < total:
        return
    lines = [f"  {r['name']}: {r['reason']}" for r in rejects[:_LISTED]]
    if len(rejects) > _LISTED:
        lines.append(f"  and {len(rejects) - _LISTED} more")
    raise DataError(
        f"{path}: {len(rejects)} of {total} images cannot be used, more than the {max_bad_share:.0%} allowed. "
        "Mend or remove these files:\n" + "\n".join(lines)
    )


def _duplicates(records: list[dict]) -> int:
    return len(records) - len({r["sha256"] for r in records})


def _fingerprint(manifest: dict) -> str:
    identity = [manifest["settings"], [(r["name"], r["sha256"]) for r in manifest["images"]]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
