"""Images under affine maps: whole-pixel ones exactly, all others by one resampling at twice the resolution.

Coordinates are pixels, x to the right and y down, from the image's centre. Beyond its edges an image goes on mirrored,
for ever, the edge pixels themselves not repeated.

The resampling is that of Karras et al., "Training Generative Adversarial Networks with Limited Data" (NeurIPS 2020),
appendix B: up by two with a wavelet's synthesis filter, bilinear look-ups, down by two with its analysis filter, so
that neither blur nor aliasing gives the augmentation away. The paper takes SYM6 and pads the image as far as the
batch's maps reach. Here it is the symmetric pair CDF 9/7 (Cohen, Daubechies and Feauveau, 1992; the one of JPEG 2000):
like SYM6, down after up gives the image back; but a mirrored image stays mirrored when it is filtered, so that one
image is enough however far a map reaches, and the work of a batch does not depend on what was drawn for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# From the middle outwards. The first has sum 2 (zeros between the pixels go up by two), the second has sum 1.
SYNTHESIS = (1.115087052456994, 0.5912717631142470, -0.05754352622849957, -0.09127176311424948)
ANALYSIS = (0.6029490182363579, 0.2668641184428723, -0.07822326652898785, -0.01686411844287495, 0.02674875741080976)


class Resampler:
    """Affine maps of square images ``[B, C, size, size]``, float32 or float64; linear, differentiable to any order.

    Gradients add up where a map takes a pixel more than once; the order in which they do is fixed on the CPU, and up to
    rounding on CUDA.

    Raises:
        ValueError: images of one pixel, which have no mirror image.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        if size < 2:
            raise ValueError(f"images of {size} pixel cannot be resampled; they must have at least 2 by 2")
        self.size, margin = size, len(ANALYSIS) - 1
        self._up = _up(size).to(device)
        self._down = _down(size).to(device)
        self._pixels = torch.arange(size, device=device)
        # Where the look-ups lie, twice as dense as the image's pixels, with what the last filter needs beyond the edge.
        places = torch.arange(-margin, 2 * size - 1 + margin, device=device, dtype=torch.float64) / 2 - (size - 1) / 2
        y, x = torch.meshgrid(places, places, indexing="ij")
        self._places = torch.stack([x, y, torch.ones_like(x)], -1)

    def move(self, images: Tensor, flip: Tensor, quarter_turns: Tensor, shift: Tensor) -> Tensor:
        """Mirror along x where ``flip [B]`` (bool), turn counterclockwise by ``quarter_turns [B]`` times 90 degrees,
        then move by the whole numbers of ``shift [B, 2]`` (x, y): pixels keep their values.
        """
        x = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        turns = quarter_turns.view(-1, 1, 1, 1)
        x = torch.where(turns % 2 == 1, x.transpose(2, 3).flip(2), x)
        x = torch.where(turns >= 2, x.flip(2, 3), x)
        for dim, by in ((3, shift[:, 0]), (2, shift[:, 1])):
            source = mirrored(self._pixels - by.long().unsqueeze(1), self.size)
            shape = [len(x), 1, 1, 1]
            shape[dim] = self.size
            x = x.gather(dim, source.view(shape).expand_as(x))
        return x

    def warp(self, images: Tensor, inverse: Tensor) -> Tensor:
        """Each image under the map whose inverse is ``inverse [B, 2, 3]``: it takes a place of the result to the place
        of the image that is shown there."""
        up, down = self._up.to(images.dtype), self._down.to(images.dtype)
        dense = up @ images @ up.mT
        at = torch.einsum("bij,hwj->bhwi", inverse.to(images.dtype), self._places.to(images.dtype))
        # grid_sample counts from -1 to 1 between the outermost samples.
        looked_up = _LookUp.apply(dense, at * (2 / (self.size - 1)))
        return down @ looked_up @ down.mT


class _LookUp(torch.autograd.Function):
    """Bilinear look-ups in images ``[B, C, H, W]`` at a constant grid ``[B, h, w, 2]``, mirrored beyond the edges.

    It is linear in the images, so its derivative is its transpose, and that one's derivative is this again: every order
    is there also where ``grid_sample`` has only the first (PyTorch before 2.12).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _LookUpTransposed.apply(gradient, grid, ctx.shape), None


class _LookUpTransposed(torch.autograd.Function):
    """The transpose of ``_LookUp``: values ``[B, C, h, w]`` spread over images of ``shape`` by the same weights."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        images = values.new_zeros(()).expand(shape)
        bilinear, reflection = 0, 2
        spread, _ = torch.ops.aten.grid_sampler_2d_backward(
            values, images, grid, bilinear, reflection, True, (True, False)
        )
        return spread

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _LookUp.apply(gradient, grid), None, None


def mirrored(index: Tensor, size: int) -> Tensor:
    """The pixel, 0 to ``size`` - 1, that an image mirrored at its edges shows at whole numbers ``index``."""
    last = size - 1
    return last - (last - index % (2 * last)).abs()


def _up(size: int) -> Tensor:
    """Matrix ``[2 size - 1, size]`` from a row of pixels to samples twice as dense, first and last at the same places.

    The row goes on mirrored on both sides.
    """
    out = torch.arange(2 * size - 1).unsqueeze(1)
    reach = len(SYNTHESIS) - 1
    index = torch.arange(-reach, size + reach).unsqueeze(0)
    return _banded((out - 2 * index).abs(), SYNTHESIS) @ _one_hot(mirrored(index[0], size), size)


def _down(size: int) -> Tensor:
    """Matrix ``[size, 2 size - 1 + 2 margin]`` from dense samples to pixels; the first sample is ``margin`` before."""
    margin = len(ANALYSIS) - 1
    out = torch.arange(size).unsqueeze(1)
    index = torch.arange(-margin, 2 * size - 1 + margin).unsqueeze(0)
    return _banded((index - 2 * out).abs(), ANALYSIS)


def _banded(distance: Tensor, taps: tuple[float, ...]) -> Tensor:
    """The tap at each distance, zero beyond the last: float64 of the shape of ``distance``."""
    listed = torch.tensor([*taps, 0.0], dtype=torch.float64)
    return listed[distance.clamp(max=len(taps))]


def _one_hot(index: Tensor, size: int) -> Tensor:
    return F.one_hot(index, size).to(torch.float64)
