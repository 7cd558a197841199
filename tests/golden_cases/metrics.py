"""Cases of the metrics on given features and probabilities: minegan_metrics."""

from __future__ import annotations

import torch
from adafm_trainer.metrics.diversity import mean_variance
from adafm_trainer.metrics.frechet import frechet_distance
from adafm_trainer.metrics.inception_score import inception_score
from adafm_trainer.metrics.kid import kid, polynomial_kernel
from adafm_trainer.metrics.mmd import dimension_bandwidth, gaussian_mmd2
from torch import Tensor

from .compare import GoldenFile

# The reference scores the probabilities in this many splits; the file does not say so itself.
SPLITS = 4


def minegan_metrics(golden: GoldenFile) -> dict[str, Tensor]:
    a, b = golden.get("in.feat_a").double(), golden.get("in.feat_b").double()
    score = inception_score(golden.get("in.probs").double(), SPLITS)
    fid = frechet_distance(a, b)
    # The reference forms one matrix of differences, so it cuts both sets to the length of the shorter.
    least = min(len(a), len(b))
    found = {
        "fid": fid,
        "is_mean": score.mean,
        "is_std": score.std,
        "kid_unbiased": kid(a[:least], b[:least]).value,
        "kid_variance": _variance(a[:least], b[:least]),
        "mean_variance": mean_variance(a),
    }
    for key in golden.expected:
        if key.startswith("out.fid_newton_schulz"):
            found[key.removeprefix("out.")] = _newton_schulz_distance(a, b, int(key.rpartition("schulz")[2]))
        if key.startswith("out.mmd2_gauss_"):
            form, _, scale = key.removeprefix("out.mmd2_gauss_").partition(".s")
            mmd = gaussian_mmd2(a, b, dimension_bandwidth(a.shape[1], float(scale)))
            found[key.removeprefix("out.")] = getattr(mmd, form).value
    return {f"out.{name}": torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def _newton_schulz_distance(a: Tensor, b: Tensor, iterations: int) -> float:
    """The Frechet distance by a matrix root iterated ``iterations`` times, from a start of Frobenius norm 1."""
    first, second = torch.cov(a.T), torch.cov(b.T)
    product = first @ second
    norm, identity = product.norm(), torch.eye(len(product), dtype=product.dtype)
    root, inverse = product / norm, identity
    for _ in range(iterations):
        step = 0.5 * (3.0 * identity - inverse @ root)
        root, inverse = root @ step, step @ inverse
    trace = (root * norm.sqrt()).trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2.0 * trace)


def _variance(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the variance of the U-statistic of two sets of m (Sutherland et al., ICLR 2017, eq. 5).

    The package gives the jackknife interval instead, which needs no equal sizes.
    """
    m = len(x)
    within = [k - torch.diag(k.diagonal()) for k in (polynomial_kernel(x, x), polynomial_kernel(y, y))]
    cross = polynomial_kernel(x, y)
    both, cross_sum = sum(k.sum() for k in within), cross.sum()
    mixed = within[0].sum(1) @ cross.sum(1) + within[1].sum(1) @ cross.sum(0)
    mixed = mixed / (m**2 * (m - 1)) - both * cross_sum / (m**3 * (m - 1))
    rows, entries = cross.sum(1).square().sum() + cross.sum(0).square().sum(), cross.square().sum()
    mean_cross = (cross_sum / m**2).square()
    first = (rows - 2 * entries) / (m**2 * (m - 1)) - 2 * mean_cross - 2 * mixed
    second = 2 * entries / m**2 - 2 * mean_cross - 4 * mixed
    for k in within:
        mean = (k.sum() / (m * (m - 1))).square()
        first += (k.sum(1).square().sum() - k.square().sum()) / (m * (m - 1) * (m - 2)) - mean
        second += k.square().sum() / (m * (m - 1)) - mean
    return float(4 * (m - 2) / (m * (m - 1)) * first + 2 / (m * (m - 1)) * second)
