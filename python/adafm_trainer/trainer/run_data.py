"""The images of a run: loaded, labelled, held out, and compared with those it began with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import keyed
from ..data.images import ImageSet, load_image_set
from ..data.labels import folder_labels
from ..errors import DataError
from ..locate import image_path
from ..methods.config import TrainConfig
from ..models.architecture import Description
from .parallel import Parallel
from .progress import Console
from .rundir import RunDirectory


@dataclass(frozen=True)
class Data:
    """The images of a run: those it trains on with their labels, those it is judged by, and the word for the latter."""

    training: ImageSet
    reals: ImageSet | None
    split: str
    labels: Tensor | None = None


def load_data(config: TrainConfig, model: Description, say: Console, parallel: Parallel) -> Data:
    """Training images and, where there are any, held-out ones; those of --eval-data on rank 0 alone, which evaluates.

    Raises:
        DataError: a set cannot be read, --holdout leaves too few images to train on, or --subset asks for too many.
    """

    def load(path: str) -> ImageSet:
        images = load_image_set(
            image_path(path), size=model.size, channels=model.channels, fit=config.fit, alpha=config.alpha
        )
        if rejects := images.manifest["rejects"]:
            say.line(f"{path}: {len(rejects)} of {len(rejects) + len(images)} files left out; see data_manifest.json")
        return images

    images = load(config.data)
    labels = None
    if config.labels == "folders":
        labels, names = folder_labels(images.names, model.classes, config.data)
        say.line(f"{len(names)} classes: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
    if config.eval_data is not None:
        images, labels = _subset(images, labels, config)
        reals = parallel.on_main("the evaluation images", partial(load, config.eval_data))
        return Data(images, reals, "heldout", labels)
    if config.holdout == 0:
        images, labels = _subset(images, labels, config)
        return Data(images, images, "train", labels)
    if config.holdout > len(images) - 2:
        raise DataError(
            f"--holdout {config.holdout} leaves fewer than 2 of the {len(images)} images of {config.data} to train on"
        )
    order = torch.from_numpy(keyed.permutation(config.seed, "holdout", 0, len(images)))
    held, kept = order[: config.holdout].sort().values, order[config.holdout :].sort().values
    reals = images.select(held)
    images, labels = _subset(images.select(kept), None if labels is None else labels[kept], config)
    return Data(images, reals, "heldout", labels)


def _subset(images: ImageSet, labels: Tensor | None, config: TrainConfig) -> tuple[ImageSet, Tensor | None]:
    """The --subset of the training images. A larger one holds a smaller one of the same seed."""
    if config.subset == 0:
        return images, labels
    if config.subset > len(images):
        raise DataError(f"--subset {config.subset}: {config.data} has {len(images)} images to train on; ask for fewer")
    order = torch.from_numpy(keyed.permutation(config.seed, "subset", 0, len(images)))
    kept = order[: config.subset].sort().values
    return images.select(kept), None if labels is None else labels[kept]


def check_data(run: RunDirectory, data: Data, allow: bool) -> None:
    path = run.root / "data_manifest.json"
    if allow or not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["training"]["images"]
    now = data.training.manifest["images"]
    if before != now:
        changed = {f["name"] for f in before} ^ {f["name"] for f in now}
        detail = f"{len(changed)} names differ" if changed else "same names, other contents"
        raise DataError(
            f"the training images are not those the run began with ({detail}); restore them, or pass "
            "--allow-data-change to continue inexactly"
        )
