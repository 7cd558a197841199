"""How far two image sets are apart, and how much of each the other covers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adafm_trainer.metrics.evaluate import frechet_note
from adafm_trainer.metrics.extractors import Extractor
from adafm_trainer.metrics.frechet import frechet_distance
from adafm_trainer.metrics.kid import kid
from adafm_trainer.metrics.prdc import prdc
from adafm_trainer.metrics.value import MetricValue


def set_distances(
    source: torch.Tensor, target: torch.Tensor, extractor: Extractor, log: Callable[[str], None] = print
) -> dict[str, MetricValue]:
    """Distances of float64 features ``[n, d]`` and ``[m, d]``, n, m >= 2, that ``extractor`` made.

    Returns, under names that end with the extractor and both numbers of images (``fd[efflite0]100x500``), fd and kid,
    which are symmetric, and from 3 images on a side target_recall, the share of target images inside the manifold of
    the source (what a source can already draw), and source_recall, the share of source images inside that of the
    target, by the balls of the third neighbour (Kynkaanniemi et al. 2019). Smaller sets get a line through ``log``.
    """
    n, m = len(source), len(target)
    values = {
        "fd": MetricValue(frechet_distance(source, target), note=frechet_note(n, m, extractor.dims)),
        "kid": kid(source, target),
    }
    if min(n, m) >= 3:
        scores = prdc(source, target)
        # With the source in the fakes' place, recall asks of each target image whether the source reaches it.
        values["target_recall"] = MetricValue(scores.recall, note=f"k={scores.recall_k}")
        values["source_recall"] = MetricValue(scores.precision, note=f"k={scores.precision_k}")
    else:
        log(f"target_recall and source_recall left out: they need 3 images on each side, got {n} and {m}")
    tags = {"n_fake": n, "n_real": m, "extractor": extractor.name, "extractor_hash": extractor.hash}
    return {f"{name}[{extractor.name}]{n}x{m}": value.tagged(**tags) for name, value in values.items()}
