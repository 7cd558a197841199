"""Gauges that show, while a run trains, whether the generator has collapsed.

They look at pixels only (images reduced to 16 x 16), so they cost a few milliseconds; they warn, they do not judge
quality. The evaluation's feature-space metrics do that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_SIDE = 16


@dataclass(frozen=True)
class Gauges:
    """``pixel_std``: mean deviation of a pixel over each image, in units of [-1, 1]. ``diversity``: mean pairwise root
    mean square distance of the fakes divided by that of the training images (1 is as varied as they are).
    ``nearest_share``: largest share of the fakes that have one and the same nearest training image; None where there is
    but one."""

    pixel_std: float
    diversity: float
    nearest_share: float | None

    def warnings(self, step: int) -> list[str]:
        """What a user should know now, each with the number that shows it."""
        found = []
        if step >= 100 and self.diversity < 0.4:
            found.append(
                f"the samples are {self.diversity:.2f} times as varied as the training images: the generator may be "
                "collapsing to a few pictures (try --head source, a smaller --lr-head or more training images)"
            )
        if step >= 100 and self.nearest_share is not None and self.nearest_share > 0.5:
            found.append(
                f"{self.nearest_share:.0%} of the samples are nearest to the same training image: the generator may be "
                "repeating it"
            )
        return found


class CollapseWatch:
    """Compares generated images ``[N, C, H, W]`` in [-1, 1] with the training images given at construction."""

    def __init__(self, training: Tensor) -> None:
        self._training = _reduce(training)
        self._spread = _mean_distance(self._training)

    def gauges(self, images: Tensor) -> Gauges:
        images = images.float()
        reduced = _reduce(images)
        nearest = torch.cdist(reduced, self._training).argmin(1)
        share = torch.bincount(nearest).max().item() / len(reduced)
        spread = _mean_distance(reduced)
        return Gauges(
            pixel_std=images.flatten(1).std(1).mean().item(),
            diversity=spread / self._spread if self._spread > 0 else 1.0,
            nearest_share=share if len(self._training) > 1 else None,
        )


def _reduce(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images.float(), _SIDE).flatten(1)


def _mean_distance(rows: Tensor) -> float:
    if len(rows) < 2:
        return 0.0
    return torch.pdist(rows).mean().item() / rows.shape[1] ** 0.5
