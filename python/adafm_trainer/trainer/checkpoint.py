"""Checkpoints that a kill at any moment leaves whole.

A checkpoint is the folder ``checkpoints/step00000500/`` with ``model.safetensors`` (generator and discriminator),
``ema.safetensors`` (average), ``trainer.pt`` (optimizers and counters) and ``manifest.json`` (sizes and SHA-256 of the
others). It is written under a temporary name, every file and the folder synced to disk, then renamed; only then is the
pointer ``last.json`` replaced. A reader takes the pointer's checkpoint, or the newest whose manifest holds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DiskError, UsageError

SCHEMA = 1
_FILES = ("model.safetensors", "ema.safetensors", "trainer.pt")
_TEMPORARY = ".writing-"


def save_checkpoint(
    folder: Path, step: int, model: dict[str, Tensor], average: dict[str, Tensor], trainer: dict, keep: int
) -> Path:
    """Write one checkpoint, point ``last.json`` at it, then remove all but the newest ``keep``.

    Raises:
        DiskError: a file could not be written; earlier checkpoints and the pointer are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / _name(step), folder / f"{_TEMPORARY}{_name(step)}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_file({k: v.detach().contiguous().cpu() for k, v in model.items()}, temporary / _FILES[0])
        save_file({k: v.detach().contiguous().cpu() for k, v in average.items()}, temporary / _FILES[1])
        torch.save(trainer, temporary / _FILES[2])
        manifest = {"schema": SCHEMA, "step": step, "files": {}}
        for name in _FILES:
            _sync(temporary / name)
            manifest["files"][name] = {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
        write_atomic(temporary / "manifest.json", json.dumps(manifest, indent=1))
        _sync(temporary)
        if final.exists() and _fault(final):
            shutil.rmtree(final)
        if final.exists():
            shutil.rmtree(temporary)
        else:
            os.replace(temporary, final)
        _sync(folder)
        write_atomic(folder / "last.json", json.dumps({"schema": SCHEMA, "step": step, "checkpoint": final.name}))
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise DiskError(
            f"checkpoint of step {step} could not be written to {folder}: {reason}. Earlier checkpoints are intact; "
            "free space or mend the folder, then continue with --resume"
        ) from error
    for old in sorted(p for p in folder.glob("step*") if p.is_dir())[:-keep]:
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(folder: Path, warn: Callable[[str], None] = print) -> tuple[Path, dict, dict, dict]:
    """Newest whole checkpoint below ``folder``: (path, model, average, trainer state).

    A damaged checkpoint is named through ``warn`` and the one before it is taken.

    Raises:
        UsageError: there is no whole checkpoint.
    """
    for temporary in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(temporary, ignore_errors=True)
    damaged = []
    for path in _candidates(folder):
        if reason := _fault(path):
            damaged.append(f"{path.name}: {reason}")
            warn(f"checkpoint {path} is damaged ({reason}); trying the one before it")
            continue
        trainer = torch.load(path / _FILES[2], map_location="cpu", weights_only=True)
        return path, load_file(path / _FILES[0]), load_file(path / _FILES[1]), trainer
    detail = f" (damaged: {'; '.join(damaged)})" if damaged else ""
    raise UsageError(f"no whole checkpoint in {folder}{detail}; start the run again without --resume")


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a reader sees the old or the new file, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _name(step: int) -> str:
    return f"step{step:08d}"


def _candidates(folder: Path) -> list[Path]:
    found = sorted((p for p in folder.glob("step*") if p.is_dir()), reverse=True)
    pointer = folder / "last.json"
    if pointer.is_file():
        try:
            named = folder / json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
            return found
        # A checkpoint newer than the pointer is whole too when its manifest holds: the kill fell between the renames.
        found.sort(key=lambda p: (p.name > named.name, p == named, p.name), reverse=True)
    return found


def _fault(path: Path) -> str | None:
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        return "no manifest"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files, schema = manifest["files"], manifest["schema"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return "unreadable manifest"
    if schema != SCHEMA:
        return f"format {schema}, this version reads {SCHEMA}"
    for name in _FILES:
        file = path / name
        if name not in files or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != files[name]["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {files[name]['bytes']} were written"
        if _sha256(file) != files[name]["sha256"]:
            return f"{name} does not match its SHA-256"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
