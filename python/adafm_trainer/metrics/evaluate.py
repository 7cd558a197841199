"""All metrics of one generated set against one real set, under names that carry extractor, count and split."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adafm_trainer.metrics.diversity import diversity, mean_variance
from adafm_trainer.metrics.extractors import Extractor
from adafm_trainer.metrics.frechet import frechet_distance
from adafm_trainer.metrics.inception_score import SPLITS, inception_score
from adafm_trainer.metrics.kid import kid
from adafm_trainer.metrics.mmd import dimension_bandwidth, gaussian_mmd2, median_bandwidth, within_bandwidth
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

    Returns ``{name: MetricValue.to_json()}`` for kid, fd (Frechet), kmmd and kmmd_biased (Gaussian kernel of sigma
    sqrt(d)), kmmd_median and kmmd_median_biased (sigma by the median heuristic), kmmd_root (the root of the
    biased form, sigma by the distances within the real set, as Xu et al., 2018, have it), precision, recall, density,
    coverage, diversity and mv (mean variance); for an extractor with a classifier, is and is_std (Inception score);
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
        values["fd"] = MetricValue(frechet_distance(x, y), note=frechet_note(n, m, extractor.dims))
        values |= _gaussian(x, y, log)
    else:
        log(f"kid, fd and kmmd left out: they need 2 images on each side, got {n} generated and {m} real")
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
        note = f"real set {mean_variance(y):.4g}" if m >= 2 else ""
        values["mv"] = MetricValue(mean_variance(x), note=note)
    if extractor.class_weights is not None:
        score = inception_score(extractor.class_probabilities(x), min(SPLITS, n))
        note = f"{score.splits} splits of {n} images, output bias left out"
        values["is"] = MetricValue(score.mean, note=note)
        values["is_std"] = MetricValue(score.std, note=note)
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


def _gaussian(x: torch.Tensor, y: torch.Tensor, log: Callable[[str], None]) -> dict[str, MetricValue]:
    """Both estimates of the Gaussian MMD^2 at both bandwidths, sigma in the note."""
    values = {}
    wide, median = dimension_bandwidth(x.shape[1]), median_bandwidth(x, y)
    for name, sigma, rule in (("kmmd", wide, "sqrt(d)"), ("kmmd_median", median, "median distance")):
        if sigma == 0:
            log(f"{name} left out: the median distance of all images is 0, most of them are the same picture")
            continue
        found = gaussian_mmd2(x, y, sigma)
        note = f"MMD^2, sigma {sigma:.6g} = {rule}"
        values[name] = found.unbiased.tagged(note=f"{note}, unbiased")
        values[f"{name}_biased"] = found.biased.tagged(note=f"{note}, biased")
    if (within := within_bandwidth(y)) > 0:
        biased = gaussian_mmd2(x, y, within).biased
        note = f"MMD, sigma {within:.6g} = root of the mean squared distance within the real set, biased"
        values["kmmd_root"] = MetricValue(max(biased.value, 0.0) ** 0.5, note=note)
    else:
        log("kmmd_root left out: all real images are the same picture")
    return values


def _tagged(value: MetricValue, n: int, m: int, extractor: Extractor, split: str) -> MetricValue:
    notes = [value.note] if value.note else []
    if split == "train":
        notes.append("train = reference")
    return value.tagged(
        n_fake=n, n_real=m, extractor=extractor.name, extractor_hash=extractor.hash, note="; ".join(notes)
    )


def frechet_note(n: int, m: int, dims: int) -> str:
    """What a Frechet distance of n and m images must be read with, or nothing."""
    return f"biased upwards: fewer images than the {dims} dimensions" if min(n, m) < dims else ""
