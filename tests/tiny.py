"""Tiny image sets, sources and settings for the trainer's tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from adafm_trainer.methods.config import TrainConfig
from adafm_trainer.models.architecture import Description
from adafm_trainer.models.catalogue import build_discriminator, build_generator
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.source import save_pair
from adafm_trainer.trainer.checkpoint import load_checkpoint
from PIL import Image

MODEL = ModelConfig(arch="resnet", size=16, nf=8, nf_max=16, z_dim=6, embed=0)


def image_folder(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """``count`` smooth colour pictures of 16 x 16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{k:03d}.png")
    return folder


def source_folder(folder: Path, model: Description = MODEL) -> Path:
    """A random pair of ``model`` on disk, with an average that differs from the raw generator."""
    torch.manual_seed(0)
    generator, discriminator, average = build_generator(model), build_discriminator(model), build_generator(model)
    return save_pair(folder, model, generator, discriminator, average)


def settings(tmp_path: Path, name: str = "run", **changes) -> TrainConfig:
    """A run of a few steps on ``tmp_path/images`` from ``tmp_path/source``, in float32, with everything small."""
    values = {
        "data": str(tmp_path / "images"),
        "source": (str(tmp_path / "source"),),
        "outdir": str(tmp_path / name),
        "steps": 6,
        "batch": 4,
        "precision": "fp32",
        "device": "cpu",
        "r1_interval": 2,
        "warmup": 4,
        "tick": 2,
        "snap": 2,
        "eval_every": -1,
        "aug": "flip",
        "dither": True,
        **changes,
    }
    return TrainConfig(**values)


def digest(run: str | Path) -> str:
    """SHA-256 over every tensor and counter of a run's newest checkpoint, wall time left out."""
    _, model, average, trainer = load_checkpoint(Path(run) / "checkpoints")
    trainer["loop"].pop("wall")
    sha = hashlib.sha256()
    _feed(sha, {"model": model, "average": average, "trainer": trainer})
    return sha.hexdigest()


def _feed(sha, value) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            sha.update(str(key).encode())
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(sha, item)
    elif isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().contiguous().numpy().tobytes())
    else:
        sha.update(repr(value).encode())
