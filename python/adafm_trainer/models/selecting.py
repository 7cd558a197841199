"""Which of several generators a sample is taken from: winners by score, their probability, the classifier of winners.

Source: Wang et al., "MineGAN" (CVPR 2020), mining of several generators, and its released code (winner by sample).
Scores, norms and logits are ``[B, N]``: B samples, N generators. Winners are int64 ``[B]``. The losses of a critic and
a miner are those of ``losses`` on what ``of_winner`` picks, so that losers have no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def winner_by_sample(scores: Tensor) -> Tensor:
    """The generator with the highest score, for each sample by itself: ``[B, N] -> [B]``; the lowest index of equals.

    Raises:
        ValueError: ``scores`` is not ``[B, N]`` with at least one generator.
    """
    return _checked(scores).argmax(1)


def winner_by_batch(scores: Tensor) -> Tensor:
    """The generator with the highest mean score of all samples, for every sample the same: ``[B, N] -> [B]``.

    The lowest index of equals. ValueError as for ``winner_by_sample``.
    """
    return _checked(scores).double().mean(0).argmax().expand(scores.shape[0])


REDUCTIONS = {"sample_max": winner_by_sample, "batch_max": winner_by_batch}


def of_winner(values: Tensor, winner: Tensor) -> Tensor:
    """The values of each sample's winner: ``[B, N]`` and ``[B]`` to ``[B]``. The gradient of the others is zero."""
    return values.gather(1, winner.unsqueeze(1)).squeeze(1)


def selector_loss(logits: Tensor, winner: Tensor) -> Tensor:
    """Mean cross entropy of the selector's ``logits [B, N]`` against the winners ``[B]``, in float32 (or float64)."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), winner)


def winner_frequency(winner: Tensor, count: int) -> Tensor:
    """Share of the samples that each of ``count`` generators won: float64 ``[count]``, without waiting for the device.

    Processes that each have a part of the batch average theirs before ``updated_probability``.
    """
    generators = torch.arange(count, device=winner.device)
    return (winner.unsqueeze(1) == generators).double().mean(0)


def updated_probability(p: Tensor, frequency: Tensor, rho: float) -> Tensor:
    """``(1 - rho) p + rho * frequency``, ``[N]`` in the type of ``p``: it keeps the sum 1, and from 1/N every p > 0."""
    return torch.lerp(p.double(), frequency.double(), rho).to(p.dtype)


def drawn(p: Tensor, normal: Tensor) -> Tensor:
    """Generators drawn from the probabilities ``p [N]`` by standard normal draws ``[B]``: int64 ``[B]``.

    A draw x becomes the uniform Phi(x), and the generator the one in whose part of [0, 1) it falls.
    """
    bounds = p.double().cumsum(0)[:-1]
    return torch.bucketize(torch.special.ndtr(normal.double()), bounds, right=True)


def _checked(scores: Tensor) -> Tensor:
    # Of equal entries torch.argmax returns the first, which is what the definition asks for.
    if scores.dim() != 2 or not scores.shape[1]:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected [B, N] of at least one generator")
    return scores
