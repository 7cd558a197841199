"""All metrics of one generated set against one real set, under names that carry extractor, count and split."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adafm_trainer.metrics.diversity import diversity
from adafm_trainer.metrics.extractors import Extractor
from adafm_trainer.metrics.frechet import frechet_distance
from adafm_trainer.metrics.kid import kid
from adafm_trainer.metrics.nearest import nearest_training
from adafm_trainer.metrics.prdc import DENSITY_K, PRECISION_K, prdc
from adafm_trainer.metrics.value import MetricValue


def metric_name(metric: str, extractor: str, count: int, split: str) -> str:
    """``kid[efflite0]5k_heldout`` for metric "kid", 5000 generated images and split "heldout"."""
    short = f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)
    return f"{metric}[{extractor}]{short}_{split}"


def evaluate(
    fake: torch.Tensor,
    real: torch.Tensor,
    extractor: Extractor,
    *,
    split: str,
    train: torch.Tensor | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Measures generated against real images.

    Each set is uint8 images ``[N, C, H, W]``, or what ``extractor`` made of them: float64 features ``[N, d]``.
    Features of images in ``real`` and ``train`` are computed once and remembered.

    Returns ``{name: MetricValue.to_json()}`` for kid, fd (Frechet), precision, recall, density, coverage and diversity,
    and with ``train`` (the training images) nearest_share and nearest_largest_share. ``split`` says what ``real`` is:
    "heldout", or "train" where there are no others, which is then noted on every value. A metric that the sets are too
    small for is left out and one that needs fewer neighbours is noted, each with a line through ``log``.
    """
    x = fake if fake.dtype == torch.float64 else extractor(fake)
    y = real if real.dtype == torch.float64 else extractor.of_set(real)
    for name, features in (("fake", x), ("real", y)):
        if features.ndim != 2 or features.shape[1] != extractor.dims:
            raise ValueError(
                f"{name} has shape {tuple(features.shape)}; features of {extractor.name} are [N, {extractor.dims}]"
            )
    n, m = len(x), len(y)
    values: dict[str, MetricValue] = {}
    if split == "train":
        log(f"train = reference: the {m} real images compared with are the training images")

    if min(n, m) >= 2:
        values["kid"] = kid(x, y)
        values["fd"] = MetricValue(frechet_distance(x, y), note=_frechet_note(n, m, extractor.dims))
    else:
        log(f"kid and fd left out: they need 2 images on each side, got {n} generated and {m} real")
    if min(n, m) >= 3:
        scores = prdc(x, y)
        for name in ("precision", "recall", "density", "coverage"):
            wanted = PRECISION_K if name in ("precision", "recall") else DENSITY_K
            used = {"precision": scores.precision_k, "recall": scores.recall_k}.get(name, scores.density_k)
            if used != wanted:
                log(f"{name}: {used} neighbours instead of {wanted}, with {m} real and {n} generated images")
            values[name] = MetricValue(getattr(scores, name), note=f"k={used}")
    else:
        log(f"precision, recall, density, coverage left out: they need 3 images on each side, got {n} and {m}")
    if n >= 2:
        note = f"real set {diversity(y):.4g}" if m >= 2 else ""
        values["diversity"] = MetricValue(diversity(x), note=note)
    if train is not None and len(train) >= 2:
        training = train if train.dtype == torch.float64 else extractor.of_set(train)
        nearest = nearest_training(x, training)
        note = "" if split == "train" else f"real set {nearest_training(y, training).share:.4g}"
        values["nearest_share"] = MetricValue(nearest.share, note=note)
        values["nearest_largest_share"] = MetricValue(nearest.largest_share)
    elif train is not None:
        log(f"nearest_share left out: it needs 2 training images, got {len(train)}")

    return {
        metric_name(name, extractor.name, n, split): _tagged(value, n, m, extractor, split).to_json()
        for name, value in values.items()
    }


def _tagged(value: MetricValue, n: int, m: int, extractor: Extractor, split: str) -> MetricValue:
    notes = [value.note] if value.note else []
    if split == "train":
        notes.append("train = reference")
    return value.tagged(
        n_fake=n, n_real=m, extractor=extractor.name, extractor_hash=extractor.hash, note="; ".join(notes)
    )


def _frechet_note(n: int, m: int, dims: int) -> str:
    return f"biased upwards: fewer images than the {dims} dimensions" if min(n, m) < dims else ""
