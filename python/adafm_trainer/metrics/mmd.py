"""Squared maximum mean discrepancy of two feature sets under any kernel, over whole sets, with an interval.

Source: Gretton et al., "A Kernel Two-Sample Test" (JMLR 2012), equations 3 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adafm_trainer.metrics.distances import BLOCK, check_features, distances
from adafm_trainer.metrics.value import MetricValue

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# The median of distances is taken over at most this many rows of the joined sets.
MEDIAN_ROWS = 4096
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class MMD:
    """Both estimates: ``unbiased`` (the U-statistic, with an interval), ``biased`` (own pairs counted; never < 0)."""

    unbiased: MetricValue
    biased: MetricValue


def mmd2(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> MMD:
    """Squared MMD of float64 ``[n, d]``, ``[m, d]``, n, m >= 2; ``kernel`` maps ``[N, d]``, ``[M, d]`` to ``[N, M]``.

    unbiased: ``sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 mean k(x_i, y_j)``,
    not clamped: sets from one distribution give values on both sides of 0. biased: the same with the pairs of equal
    index, over n^2 and m^2. The interval is value -+ 1.96 times the delete-one jackknife deviation over the images of
    both sets (Arvesen 1969), absent below 3 images on a side. Differentiation is not supported.
    """
    check_features(x, y, least=2, what="mmd2")
    n, m = len(x), len(y)
    (within_x, self_x), (within_y, self_y) = _own_sums(x, kernel), _own_sums(y, kernel)
    cross_x, cross_y = _cross_sums(x, y, kernel)
    total_x, total_y, total_cross = within_x.sum(), within_y.sum(), cross_x.sum()
    cross = 2.0 * total_cross / (n * m)
    value = float(total_x / (n * (n - 1)) + total_y / (m * (m - 1)) - cross)
    biased = float((total_x + self_x) / n**2 + (total_y + self_y) / m**2 - cross)
    low = high = None
    if min(n, m) >= 3:
        # Leaving image i out takes its row and its column out of its own square and its row out of the cross sum.
        left_x = (total_x - 2 * within_x) / ((n - 1) * (n - 2)) - 2.0 * (total_cross - cross_x) / ((n - 1) * m)
        left_y = (total_y - 2 * within_y) / ((m - 1) * (m - 2)) - 2.0 * (total_cross - cross_y) / (n * (m - 1))
        variance = sum((len(left) - 1) / len(left) * (left - left.mean()).square().sum() for left in (left_x, left_y))
        reach = _Z95 * float(variance) ** 0.5
        low, high = value - reach, value + reach
    return MMD(MetricValue(value, low, high, n_fake=n, n_real=m), MetricValue(biased, n_fake=n, n_real=m))


def gaussian_mmd2(x: torch.Tensor, y: torch.Tensor, sigma: float) -> MMD:
    """``mmd2`` under the Gaussian kernel ``exp(-|a - b|^2 / (2 sigma^2))``: the KMMD reported for small image sets.

    Noguchi and Harada (ICCV 2019) and Wang et al., MineGAN (CVPR 2020), report a KMMD and publish neither bandwidth nor
    estimator, so values compare only where sigma, estimator and extractor are the same. ValueError unless sigma > 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; the bandwidth of a Gaussian kernel must be positive")
    return mmd2(x, y, lambda a, b: torch.exp(distances(a, b).square() / (-2.0 * sigma**2)))


def dimension_bandwidth(dims: int, scale: float = 1.0) -> float:
    """``scale * sqrt(dims)``: for features of unit variance, of the order of the distance of two images."""
    return scale * dims**0.5


def median_bandwidth(x: torch.Tensor, y: torch.Tensor) -> float:
    """The median heuristic: the median distance of two different rows of both sets joined (Gretton et al. 2012, 8).

    Of more than ``MEDIAN_ROWS`` rows evenly spaced ones are taken. It is 0 where most images are the same.
    """
    check_features(x, y, what="median_bandwidth")
    rows = torch.cat([x, y])
    if len(rows) > MEDIAN_ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, MEDIAN_ROWS, dtype=torch.float64).long()]
    apart = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    return float(distances(rows, rows)[apart].median())


def within_bandwidth(real: torch.Tensor) -> float:
    """The root of the mean squared distance within ``real [m, d]``, pairs of equal index counted.

    Xu et al., "An empirical study on evaluation metrics of generative adversarial networks" (2018), scale by it.
    """
    check_features(real, real, what="within_bandwidth")
    total = sum(distances(part, real).square().sum() for part in real.split(BLOCK))
    return float(total / len(real) ** 2) ** 0.5


def _own_sums(x: torch.Tensor, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums of ``k(x, x)`` without the diagonal, and the sum of the diagonal."""
    sums, own = [], torch.zeros((), dtype=torch.float64)
    for start in range(0, len(x), BLOCK):
        block = kernel(x[start : start + BLOCK], x)
        diagonal = block.diagonal(start)
        sums.append(block.sum(dim=1) - diagonal)
        own += diagonal.sum()
    return torch.cat(sums), own


def _cross_sums(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column sums of ``k(x, y)``."""
    of_x, of_y = [], torch.zeros(len(y), dtype=torch.float64)
    for part in x.split(BLOCK):
        block = kernel(part, y)
        of_x.append(block.sum(dim=1))
        of_y += block.sum(dim=0)
    return torch.cat(of_x), of_y
