"""Evaluation of a generator against held-out images of the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.grid import to_uint8
from ..methods.config import TrainConfig
from ..metrics.evaluate import evaluate
from ..metrics.extractors import Extractor, get_extractor
from ..metrics.nearest import nearest_training_images
from ..report.pictures import nearest_pairs
from .progress import Console
from .run_data import Data
from .sampling import generate

SUMMARY = ("kid", "coverage", "diversity", "nearest_share")


@dataclass
class Evaluator:
    """Draws ``samples`` images (always the same latents for one seed) and compares them with ``reals``.

    ``split`` is the word that every metric's name ends with: "heldout" for images withheld from training, "train" where
    there are none but the training images. ``training`` serves the nearest-image check.
    """

    extractor: Extractor
    reals: Tensor
    split: str
    training: Tensor
    samples: int
    seed: int
    _real_features: Tensor | None = field(default=None, init=False, repr=False)
    _training_features: Tensor | None = field(default=None, init=False, repr=False)
    _fakes: Tensor | None = field(default=None, init=False, repr=False)
    _fake_features: Tensor | None = field(default=None, init=False, repr=False)

    def evaluate(
        self,
        generator: nn.Module,
        autocast: torch.dtype | None,
        data_scale: float = 1.0,
        log: Callable[[str], None] = print,
    ) -> dict[str, dict]:
        """All metrics by name, each a mapping with ``value`` and, where there is one, ``low`` and ``high``.

        ``log`` takes a line for every metric that the sets are too small for.
        """
        if self._real_features is None:
            self._real_features = self.extractor.of_set(self.reals)
            self._training_features = self.extractor.of_set(self.training)
        images = generate(generator, self.seed, "eval", range(self.samples), autocast=autocast)
        self._fakes = to_uint8(images / data_scale)
        self._fake_features = self.extractor(self._fakes)
        return evaluate(
            self._fake_features,
            self._real_features,
            extractor=self.extractor,
            split=self.split,
            train=self._training_features,
            log=log,
        )

    def summary(self, metrics: dict[str, dict]) -> str:
        """One line for the log: the metrics that judge a small set, KID with its interval first."""
        parts = []
        for name, entry in metrics.items():
            if name.partition("[")[0] not in SUMMARY:
                continue
            text = f"{name} {entry['value']:.3f}"
            if entry["low"] is not None:
                text += f" [{entry['low']:.3f}, {entry['high']:.3f}]"
            parts.append(text)
        return "  ".join(parts)

    def save_nearest(self, path: Path, count: int = 16) -> None:
        """PNG of the first ``count`` evaluated images over their nearest training images in feature space."""
        if self._fakes is None:
            raise RuntimeError("evaluate() comes before save_nearest()")
        indices, distances = nearest_training_images(self._fake_features[:count], self._training_features)
        nearest_pairs(self._fakes[:count], self.training, indices, distances, path)


def make_evaluator(config: TrainConfig, data: Data, console: Console) -> Evaluator | None:
    if config.eval_every < 0 or data.reals is None:
        return None
    extractor = get_extractor(config.extractor)
    words = {
        "heldout": "images withheld from training",
        "train": "the training images themselves (nothing is held out)",
    }
    console.line(
        f"evaluation: {config.eval_samples} samples against {len(data.reals)} {words[data.split]}, {extractor.name}"
    )
    return Evaluator(extractor, data.reals.pixels, data.split, data.training.pixels, config.eval_samples, config.seed)
