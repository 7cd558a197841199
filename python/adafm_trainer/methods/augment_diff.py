"""DiffAugment: colour, translation and cutout, always on, for real and generated images alike.

Written from Zhao, Liu, Lin, Zhu and Han, "Differentiable Augmentation for Data-Efficient GAN Training" (NeurIPS 2020),
section 3.2 and the appendix's table of ranges, whose strongest policy (all three) this is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .augment_base import Augment, per_image

# Shares of the image's side.
MAX_SHIFT, CUTOUT = 1 / 8, 1 / 2


class DiffAugment(Augment):
    """Colour, translation and cutout of every image.

    Colour: brightness ``x + b``, b in [-0.5, 0.5); saturation, the distance of the channels from their mean times s in
    [0, 2), which leaves grey images as they are; contrast, the distance from the image's mean times c in [0.5, 1.5).
    Translation: by whole pixels, evenly from -size/8 to size/8 in each direction (rounded), zeros move in. Cutout: a
    square of half the size, its centre evenly over the image, becomes zero (mid grey).
    """

    name = "diffaug"
    uniforms = ("brightness", "saturation", "contrast", "shift_x", "shift_y", "cut_x", "cut_y")
    least_size = 2

    def __init__(self, channels: int, size: int, device: torch.device | str = "cpu") -> None:
        super().__init__(channels, size, device)
        self.shift, self.cut = int(size * MAX_SHIFT + 0.5), int(size * CUTOUT + 0.5)
        self._pixels = torch.arange(size, device=self.device)

    def transform(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        x = images + per_image(draws["brightness"] - 0.5)
        if self.channels > 1:
            grey = x.mean(1, keepdim=True)
            x = (x - grey) * per_image(2 * draws["saturation"]) + grey
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * per_image(draws["contrast"] + 0.5) + mean
        x = self._shifted(x, self._whole(draws["shift_x"], 2 * self.shift + 1) - self.shift, 3)
        x = self._shifted(x, self._whole(draws["shift_y"], 2 * self.shift + 1) - self.shift, 2)
        # An even side has no middle pixel: its centre lies between pixels, where there is one place more.
        places = self.size + (1 - self.cut % 2)
        rows, columns = (self._covered(self._whole(draws[name], places)) for name in ("cut_y", "cut_x"))
        hole = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        return x.masked_fill(hole, 0.0)

    @staticmethod
    def _whole(uniform: Tensor, count: int) -> Tensor:
        """Whole numbers 0 to ``count`` - 1, evenly, from uniform numbers in [0, 1): int64 ``[B]``."""
        # The largest float32 below 1 times a count can round up to it.
        return (uniform * count).long().clamp(max=count - 1)

    def _shifted(self, x: Tensor, by: Tensor, dim: int) -> Tensor:
        """``x`` moved by ``by [B]`` pixels along ``dim``, zeros where nothing came from."""
        source = self._pixels - by.unsqueeze(1)
        inside = (source >= 0) & (source < self.size)
        shape = [len(x), 1, 1, 1]
        shape[dim] = self.size
        index = source.clamp(0, self.size - 1).view(shape).expand_as(x)
        return x.gather(dim, index).masked_fill(~inside.view(shape), 0.0)

    def _covered(self, centre: Tensor) -> Tensor:
        """Pixels that a square of side ``cut`` around each centre covers in one direction: bool ``[B, size]``."""
        first = centre.unsqueeze(1) - self.cut // 2
        return (self._pixels >= first) & (self._pixels < first + self.cut)
