"""The image sets of a study, written once each and whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from ..data import mnist
from ..data.dicebear import style_info, write_set
from ..data.grid import save_grid
from ..data.packaged import GENERATORS, packaged_file
from ..models.catalogue import build_generator
from ..models.source import load_pair
from ..trainer.sampling import generate
from .plan import Avatars, Digits, Drawn, Images

SIDE_FACES, SIDE_DIGITS = 32, 28


def image_set(images: Images, folder: Path, outside: dict[str, Path]) -> Path:
    """Path of ``images`` below ``folder``, made if it is not there; ``outside`` has the sources of ``Drawn`` by name.

    Raises:
        UsageError: a package of the extra ``study`` is missing. DataError: there are too few images.
    """
    suffix = ".zip" if isinstance(images, Avatars) else ""
    path = folder / f"{images.name}{suffix}"
    if path.exists():
        return path
    apart = []
    if isinstance(images, Avatars) and images.apart is not None:
        apart = [image_set(images.apart, folder, outside)]
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    part = unfinished / path.name
    if isinstance(images, Digits):
        mnist.write_folders(part, size=SIDE_DIGITS, digits=images.digits, first=images.first, count=images.count)
    elif isinstance(images, Avatars):
        write_set(part, images.styles, images.count, first=images.first, size=SIDE_FACES, exclude=apart)
    else:
        _draw(images, part, outside)
    os.replace(part, path)
    for record in unfinished.glob("*.json"):
        os.replace(record, folder / record.name)
    unfinished.rmdir()
    return path


def require_packages(images: Images) -> None:
    """UsageError, with the remedy, where what ``images`` is made from is not installed; to be known at the start."""
    if isinstance(images, Digits):
        packaged_file(mnist.DISTRIBUTION, mnist.VERSION, mnist.FILE, extra="study")
    elif isinstance(images, Avatars):
        style_info(images.styles[0])
    else:
        for name in images.generators:
            packaged_file(*GENERATORS[name])


def _draw(images: Drawn, folder: Path, outside: dict[str, Path]) -> None:
    """PNG files ``<generator>/<latent>.png`` of generators in evaluation mode."""
    for name in images.generators:
        pair = load_pair(outside[name])
        generator = build_generator(pair.cfg)
        generator.load_state_dict(pair.generator_state)
        generator.eval()
        indices = range(images.first, images.first + images.count)
        drawn = generate(generator, 0, "study", indices)
        for index, picture in zip(indices, torch.unbind(drawn), strict=True):
            save_grid(folder / name / f"{index:06d}.png", picture[None])
