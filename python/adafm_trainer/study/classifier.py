"""A small classifier of digits, which says what a generator draws; itself judged on digits it has not seen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import keyed
from ..data.images import load_image_set
from ..trainer.checkpoint import write_atomic
from .images import SIDE_DIGITS

_BATCH, _RATE, _SHIFT = 64, 2e-3, 2


@dataclass
class Classifier:
    """``network`` and the share ``accuracy`` of ``tested`` unseen digits that it names rightly."""

    network: nn.Module
    accuracy: float
    tested: int

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Digits int64 ``[N]`` of uint8 images ``[N, 1, 28, 28]``."""
        return torch.cat([self.network(_scaled(part)).argmax(1) for part in images.split(250)])


def digit_classifier(training: Path, apart: Path, steps: int, folder: Path) -> Classifier:
    """Trained on the set ``training`` for ``steps`` batches and tested on ``apart``; read from ``folder`` once it is
    there. Labels are the names of the sets' folders. Digits are shifted by up to 2 pixels while it learns."""
    network = _network()
    weights, record = folder / "classifier.safetensors", folder / "classifier.json"
    if record.is_file():
        network.load_state_dict(load_file(weights))
        values = json.loads(record.read_text(encoding="utf-8"))
        return Classifier(network.eval(), values["accuracy"], values["tested"])
    images, labels = _labelled(training)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _network()
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / steps)
        indices = range(step * _BATCH, (step + 1) * _BATCH)
        draws = torch.special.ndtr(keyed.normal(0, "classifier", step, indices, (3,)).double())
        rows = (draws[:, 0] * len(images)).long().clamp_(max=len(images) - 1)
        across, down = ((draws[:, 1:] * (2 * _SHIFT + 1)).long() - _SHIFT).clamp_(-_SHIFT, _SHIFT)[0].tolist()
        batch = _scaled(images[rows]).roll((down, across), (2, 3))
        loss = F.cross_entropy(network(batch), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    classifier = Classifier(network.eval(), 0.0, 0)
    images, labels = _labelled(apart)
    classifier.tested = len(labels)
    classifier.accuracy = float((classifier(images) == labels).double().mean())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), weights)
    write_atomic(record, json.dumps({"accuracy": classifier.accuracy, "tested": classifier.tested, "steps": steps}))
    return classifier


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (SIDE_DIGITS // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _labelled(path: Path) -> tuple[Tensor, Tensor]:
    images = load_image_set(path, size=SIDE_DIGITS, channels=1)
    return images.pixels, torch.tensor([int(Path(name).parent.name) for name in images.names])


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
