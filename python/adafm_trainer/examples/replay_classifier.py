"""A classifier that learns the tasks of a GAN memory one after another, with and without replay.

    python -m adafm_trainer.examples.replay_classifier --bank B --source S --data flowers=FOLDER --data cats=FOLDER

After each task's images are gone, only the bank can show them: with replay every batch holds, beside images of the
task at hand, as many generated ones of each earlier task, and one cross-entropy goes over all (Cong et al., "GAN Memory
with No Forgetting", NeurIPS 2020, section 5.3). The paper classifies ImageNet groups with a ResNet-18 that ImageNet
trained; here a small convolutional network starts at random, so that replay is all that it can remember by.

Labels are the tasks; where the bank's tasks have classes, the class folders within them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import keyed
from ..data.images import load_image_set
from ..data.labels import folder_labels
from ..data.sampler import indices as sample_indices
from ..errors import AdafmError, DataError, UsageError
from ..locate import image_path
from ..models.memory_mixed import MixedTaskGenerator
from ..trainer.bank import OpenBank, open_bank

HELD_OUT = 0.2


@dataclass(frozen=True)
class Split:
    """Images of a task, uint8 ``[N, C, H, W]``, with their labels ``[N]``: those learned from and those withheld."""

    name: str
    images: Tensor
    labels: Tensor
    heldout_images: Tensor
    heldout_labels: Tensor


def classifier(channels: int, outputs: int, width: int = 16) -> nn.Sequential:
    """Three strided convolutions, an average over places, a linear layer: ``[B, channels, H, W] -> [B, outputs]``."""
    layers: list[nn.Module] = []
    for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, outputs))


def load_task(opened: OpenBank, number: int, name: str, folder: str, seed: int) -> Split:
    """The images of ``folder`` as the bank's networks see them, a fifth of them withheld.

    Raises:
        DataError: they cannot be read, or are too few to withhold any.
    """
    source, classes = opened.bank.model.source, opened.bank.model.classes
    images = load_image_set(image_path(folder), size=source.size, channels=source.channels)
    held = round(HELD_OUT * len(images))
    if held < 1:
        raise DataError(f"{folder} has {len(images)} images; there must be at least 3, so that some can be withheld")
    inside = folder_labels(images.names, classes, folder)[0] if classes else torch.zeros(len(images), dtype=torch.int64)
    labels = inside + number * max(1, classes)
    order = torch.from_numpy(keyed.permutation(seed, f"heldout/{name}", 0, len(images)))
    rows, away = order[held:], order[:held]
    return Split(name, images.batch(rows), labels[rows], images.batch(away), labels[away])


def learn(
    model: nn.Module, task: Split, steps: int, batch: int, rate: float, seed: int, replay: Callable[[int], tuple] | None
) -> None:
    """Adam steps on batches of ``task``, joined by what ``replay(step)`` gives: images in [-1, 1] and their labels."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(steps):
        rows = sample_indices(seed, step * batch, batch, len(task.images))
        images, labels = _unit(task.images[rows]), task.labels[rows]
        if replay is not None:
            more, more_labels = replay(step)
            images, labels = torch.cat([images, more]), torch.cat([labels, more_labels])
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, task: Split) -> float:
    """Share of the withheld images of ``task`` that get their label."""
    parts = [model(_unit(part)).argmax(1) for part in task.heldout_images.split(100)]
    return (torch.cat(parts) == task.heldout_labels).double().mean().item()


def replay_of(opened: OpenBank, names: Sequence[str], batch: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of ``batch`` images of each task of ``names``, drawn as one mixed batch from the same latents for all."""
    generator, classes = MixedTaskGenerator(opened.bank), opened.bank.model.classes
    tasks = [name for name in names for _ in range(batch)]
    numbers = torch.arange(len(names)).repeat_interleave(batch)

    @torch.no_grad()
    def draw(step: int) -> tuple[Tensor, Tensor]:
        z = keyed.normal(seed, "replay/z", step, range(batch), (generator.network.z_dim,)).repeat(len(names), 1)
        y = None
        if classes:
            y = (keyed.uniform(seed, "replay/y", step, range(batch)) * classes).long().clamp_(max=classes - 1)
            y = y.repeat(len(names))
        images = (generator(z, tasks, y) / opened.data_scale).clamp_(-1, 1)
        return images, numbers * max(1, classes) + (0 if y is None else y)

    return draw


def compare(
    opened: OpenBank,
    folders: Sequence[tuple[str, str]],
    *,
    steps: int = 150,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, list[list[float]]]:
    """Accuracies after each task, on every task, for "replay" and "no replay", from the same start.

    ``folders`` holds (task, images) in the order they are learned. The first task sees one label only, unless tasks
    have classes.

    Raises:
        UsageError: fewer than two tasks, one twice, or one that the bank does not have. DataError: see ``load_task``.
    """
    names = [name for name, _ in folders]
    if len(names) < 2 or len(set(names)) != len(names):
        raise UsageError(f"--data names {', '.join(names) or 'nothing'}: give two tasks or more, each once")
    if missing := [name for name in names if name not in opened.bank]:
        raise UsageError(f"--data {missing[0]}=...: the bank has {', '.join(opened.bank.names) or 'no task'}")
    tasks = [load_task(opened, number, *pair, seed) for number, pair in enumerate(folders)]
    model = opened.bank.model
    torch.manual_seed(seed)
    start = classifier(model.source.channels, len(tasks) * max(1, model.classes))
    models = {"replay": start, "no replay": copy.deepcopy(start)}
    found: dict[str, list[list[float]]] = {way: [] for way in models}
    wide = max(len(f"after {name}, no replay  ") for name in names)
    head = "  ".join(name.rjust(8) for name in [*names, "all seen"])
    say(f"accuracy on withheld images\n{'':{wide}}{head}")
    for number, task in enumerate(tasks):
        draw = replay_of(opened, names[:number], batch, seed) if number else None
        for way, network in models.items():
            learn(network, task, steps, batch, rate, seed, draw if way == "replay" else None)
            found[way].append([accuracy(network, each) for each in tasks])
            row = found[way][-1]
            seen = sum(row[: number + 1]) / (number + 1)
            say(f"{f'after {task.name}, {way}':{wide}}" + "  ".join(f"{value:8.3f}" for value in [*row, seen]))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="replay_classifier", description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", required=True, help="folder of the bank")
    parser.add_argument("--source", required=True, help="the source of its tasks")
    parser.add_argument("--source-weights", choices=("average", "raw"), default="average", help="those of the tasks")
    parser.add_argument("--data", required=True, action="append", metavar="TASK=FOLDER", help="a task's real images")
    parser.add_argument("--steps", type=int, default=150, help="steps on each task")
    parser.add_argument("--batch", type=int, default=16, help="images of each task in a batch")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's step size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    try:
        folders = [_named(value) for value in args.data]
        opened = open_bank(args.bank, args.source, args.source_weights)
        compare(opened, folders, steps=args.steps, batch=args.batch, rate=args.lr, seed=args.seed)
    except AdafmError as error:
        parser.exit(error.exit_code, f"replay_classifier: {error}\n")
    return 0


def _named(value: str) -> tuple[str, str]:
    name, _, folder = value.partition("=")
    if not name or not folder:
        raise UsageError(f"--data {value}: give TASK=FOLDER, with TASK as the bank calls it")
    return name, folder


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


if __name__ == "__main__":
    raise SystemExit(main())
