"""Frechet distance between two feature sets, exact also where there are fewer images than dimensions."""

from __future__ import annotations

import torch

from adafm_trainer.metrics.distances import check_features


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """``|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))`` with sample covariances (divisor n - 1).

    x float64 ``[n, d]``, y float64 ``[m, d]``, n, m >= 2. With A, B the centred features over sqrt(n - 1), sqrt(m - 1),
    the trace of the root is the sum of the singular values of ``A B^T`` (Dowson and Landau 1982 for the distance), an
    ``n x m`` matrix: no d x d matrix is formed and a rank-deficient covariance costs no accuracy. A set of more images
    than dimensions is first reduced to the triangular factor of its QR decomposition. The value is biased upwards, the
    more so the fewer images: compare values of equal n and m alone. Differentiation is not supported.
    """
    check_features(x, y, least=2, what="frechet_distance")
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    a, b = (x - mean_x) / (len(x) - 1) ** 0.5, (y - mean_y) / (len(y) - 1) ** 0.5
    traces = a.square().sum() + b.square().sum()
    root = torch.linalg.svdvals(_reduced(a) @ _reduced(b).T).sum()
    return float((mean_x - mean_y).square().sum() + traces - 2.0 * root)


def _reduced(a: torch.Tensor) -> torch.Tensor:
    """A matrix of at most d rows with the same ``A^T A``."""
    return torch.linalg.qr(a, mode="r").R if a.shape[0] > a.shape[1] else a
