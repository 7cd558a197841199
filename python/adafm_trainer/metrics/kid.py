"""Kernel distance (KID; Binkowski et al., "Demystifying MMD GANs", ICLR 2018) over whole sets, with an interval."""

from __future__ import annotations

import warnings

import torch

from adafm_trainer.metrics.distances import check_features
from adafm_trainer.metrics.mmd import mmd2
from adafm_trainer.metrics.value import MetricValue

# Within this range of mean |x|^2 / d the cubic kernel neither turns linear nor drowns in its largest term.
UNIT_SCALE = (1e-2, 1e2)


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``(x . y / d + 1)^3`` for all rows: ``[N, d]``, ``[M, d]`` -> ``[N, M]``."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kid(x: torch.Tensor, y: torch.Tensor) -> MetricValue:
    """Unbiased squared MMD of two feature sets under the cubic kernel: the exact U-statistic over the full sets.

    x float64 ``[n, d]``, y float64 ``[m, d]``, n, m >= 2; not multiplied by 1000 and not clamped: sets from one
    distribution give values on both sides of 0. Estimate and interval are those of ``mmd2``. Warns where the features
    are not of about unit scale, for which the kernel is meant. Differentiation is not supported.
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
    return mmd2(x, y, polynomial_kernel).unbiased
