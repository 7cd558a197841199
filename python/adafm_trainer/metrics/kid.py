"""Kernel distance (KID; Binkowski et al., "Demystifying MMD GANs", ICLR 2018) over whole sets, with an interval."""

from __future__ import annotations

import warnings

import torch

from adafm_trainer.metrics.distances import BLOCK, check_features
from adafm_trainer.metrics.value import MetricValue

# Within this range of mean |x|^2 / d the cubic kernel neither turns linear nor drowns in its largest term.
UNIT_SCALE = (1e-2, 1e2)
_Z95 = 1.959963984540054


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``(x . y / d + 1)^3`` for all rows: ``[N, d]``, ``[M, d]`` -> ``[N, M]``."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kid(x: torch.Tensor, y: torch.Tensor) -> MetricValue:
    """Unbiased squared MMD of two feature sets under the cubic kernel: the exact U-statistic over the full sets.

    ``sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 mean k(x_i, y_j)``.
    x float64 ``[n, d]``, y float64 ``[m, d]``, n, m >= 2; not multiplied by 1000. It is not clamped: sets from one
    distribution give values on both sides of 0. The interval is value -+ 1.96 times the delete-one jackknife deviation
    over the images of both sets (Arvesen 1969), absent below 3 images on a side. Warns where the features are not of
    about unit scale, for which the kernel is meant. Differentiation is not supported.
    """
    check_features(x, y, least=2, what="kid")
    for name, rows in (("x", x), ("y", y)):
        scale = float(rows.square().mean())
        if not UNIT_SCALE[0] <= scale <= UNIT_SCALE[1]:
            warnings.warn(
                f"kid: mean |x|^2/d of features {name} is {scale:.3g}, far from 1, where the cubic kernel says little: "
                "use features of about unit scale",
                stacklevel=2,
            )
    n, m = len(x), len(y)
    within_x, within_y = _sums_without_self(x), _sums_without_self(y)
    cross_x, cross_y = _cross_sums(x, y)
    total_x, total_y, total_cross = within_x.sum(), within_y.sum(), cross_x.sum()
    mean_x, mean_y = total_x / (n * (n - 1)), total_y / (m * (m - 1))
    value = float(mean_x + mean_y - 2.0 * total_cross / (n * m))
    if min(n, m) < 3:
        return MetricValue(value, n_fake=n, n_real=m)
    # Leaving image i out takes its row and its column out of its own square and its row out of the cross sum.
    left_x = (total_x - 2 * within_x) / ((n - 1) * (n - 2)) - 2.0 * (total_cross - cross_x) / ((n - 1) * m)
    left_y = (total_y - 2 * within_y) / ((m - 1) * (m - 2)) - 2.0 * (total_cross - cross_y) / (n * (m - 1))
    variance = sum((len(left) - 1) / len(left) * (left - left.mean()).square().sum() for left in (left_x, left_y))
    reach = _Z95 * float(variance) ** 0.5
    return MetricValue(value, value - reach, value + reach, n_fake=n, n_real=m)


def _sums_without_self(x: torch.Tensor) -> torch.Tensor:
    sums = torch.cat([polynomial_kernel(part, x).sum(dim=1) for part in x.split(BLOCK)])
    return sums - (x.square().sum(dim=1) / x.shape[1] + 1.0) ** 3


def _cross_sums(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    of_x, of_y = [], torch.zeros(len(y), dtype=torch.float64)
    for part in x.split(BLOCK):
        block = polynomial_kernel(part, y)
        of_x.append(block.sum(dim=1))
        of_y += block.sum(dim=0)
    return torch.cat(of_x), of_y
