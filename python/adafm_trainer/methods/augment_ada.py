"""Adaptive discriminator augmentation: pixel moves, geometry and colour, each with a probability that D's verdicts set.

Written from Karras, Aittala, Hellsten, Laine, Lehtinen and Aila, "Training Generative Adversarial Networks with Limited
Data" (NeurIPS 2020), section 3 and appendix B. The groups are those the paper recommends (blitting, geometry, colour);
its image-space filtering and corruptions, which it found to gain nothing or to harm, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .augment_base import Augment, per_image
from .augment_geometry import Resampler

Exchange = Callable[[list[Tensor]], None]

MAX_SHIFT = 0.125
SCALE_SIGMA = 0.2 * math.log(2)
SHIFT_SIGMA = 0.125
BRIGHTNESS_SIGMA = 0.2
CONTRAST_SIGMA = 0.5 * math.log(2)
SATURATION_SIGMA = math.log(2)


class AdaptiveAugment(Augment):
    """The transforms of the paper in their order, each applied to an image with probability ``p``.

    Blitting: mirroring along x (evenly yes or no), a turn by 0, 90, 180 or 270 degrees, a move by whole pixels of up to
    1/8 of the side. Geometry: scaling (log-normal), rotation before and after stretching (log-normal), with a
    probability each that gives ``p`` for any of both, a move by fractions of a pixel (normal, 1/8 of the side). Colour:
    brightness, contrast, a flip of the luma axis (evenly yes or no), and, for three channels, a hue rotation and
    saturation. An image that drew no transform of a group passes it bit for bit; one with blitting alone keeps its
    pixels' values.

    ``p`` starts at 0. ``update`` counts the sign of D's logits on reals, r_t = E[sign(D(real))]; every ``interval``
    calls ``p`` rises by (images since) / ``images`` where their mean is above ``target``, and else falls by as much,
    within [0, 1]: from 0 to 1 takes ``images`` images at least. r_t has a meaning where a positive logit stands for
    real (non-saturating and hinge loss), and none for a Wasserstein critic.

    Args:
        exchange: averages tensors over processes in place; None for one process. Called by every
            ``update``, so that all processes hold the same state.

    Raises:
        ValueError: a target outside [-1, 1], an interval or a number of images below 1; and as ``Augment``.
    """

    name = "ada"
    gates = (
        "flip", "turn", "move", "scale", "rotate_before", "stretch", "rotate_after", "shift",
        "brightness", "contrast", "luma", "hue", "saturation",
    )  # fmt: skip
    uniforms = (
        *(f"if_{name}" for name in gates),
        "flip", "turn", "move_x", "move_y", "rotate_before", "rotate_after", "luma", "hue",
    )  # fmt: skip
    normals = ("scale", "stretch", "shift_x", "shift_y", "brightness", "contrast", "saturation")
    channel_counts = (1, 3)
    least_size = 2

    def __init__(
        self,
        channels: int,
        size: int,
        device: torch.device | str = "cpu",
        target: float = 0.6,
        interval: int = 4,
        images: int = 500_000,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(channels, size, device)
        if not -1 <= target <= 1:
            raise ValueError(f"the target of D's mean sign on reals is {target}; it must lie in [-1, 1]")
        if interval < 1 or images < 1:
            raise ValueError(f"interval and images are {interval} and {images}; both must be at least 1")
        self.target, self.interval, self.images, self._exchange = target, interval, images, exchange
        self.p = torch.zeros((), device=self.device)
        self.r = torch.zeros((), device=self.device)
        """r_t of the last adjustment."""
        self._signs = torch.zeros((), device=self.device)
        self._calls, self._images_before = 0, 0
        self._resampler = Resampler(size, self.device)
        # Colours along and across the grey axis, and the cross product with it: a hue rotation by h keeps the first and
        # takes the second to cos(h) * across + sin(h) * turned.
        along = torch.full((3, 3), 1 / 3, dtype=torch.float64)
        turned = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
        eye = torch.eye(3, dtype=torch.float64)
        self._axes = tuple(m.to(self.device) for m in (along, eye - along, turned))

    def transform(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        on = self._applied(draws)
        return self._colour(self._geometry(images, draws, on), draws, on)

    def _applied(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """Which image takes which transform: bool ``[B]``."""
        p = self.p.to(draws["if_flip"].dtype)
        either = 1 - (1 - p).sqrt()
        return {gate: draws[f"if_{gate}"] < (either if gate.startswith("rotate") else p) for gate in self.gates}

    def _geometry(self, images: Tensor, draws: dict[str, Tensor], on: dict[str, Tensor]) -> Tensor:
        zero = torch.zeros_like(draws["flip"])
        flip = on["flip"] & (draws["flip"] < 0.5)
        turns = torch.where(on["turn"], (4 * draws["turn"]).floor(), zero)
        move = torch.stack([draws["move_x"], draws["move_y"]], 1)
        move = ((2 * move - 1) * MAX_SHIFT * self.size).round() * on["move"].unsqueeze(1)
        moved = self._resampler.move(images, flip, turns.long(), move)

        scale = torch.where(on["scale"], (SCALE_SIGMA * draws["scale"]).exp(), 1.0)
        stretch = torch.where(on["stretch"], (SCALE_SIGMA * draws["stretch"]).exp(), 1.0)
        shift = torch.stack([draws["shift_x"], draws["shift_y"]], 1)
        shift = shift * (SHIFT_SIGMA * self.size) * on["shift"].unsqueeze(1)
        before, after = (
            torch.where(on[name], (2 * draws[name] - 1) * math.pi, 0.0) for name in ("rotate_before", "rotate_after")
        )
        # From the image to the result; what takes the result to the image is the inverses in the same order.
        inverse = _linear(1 - 2 * flip.to(zero.dtype), zero, zero, torch.ones_like(zero))
        inverse = inverse @ _rotation((math.pi / 2) * turns) @ _translation(-move)
        inverse = inverse @ _linear(1 / scale, zero, zero, 1 / scale) @ _rotation(before)
        inverse = inverse @ _linear(1 / stretch, zero, zero, stretch) @ _rotation(after) @ _translation(-shift)
        warped = self._resampler.warp(images, inverse[:, :2])
        any_warp = on["scale"] | on["rotate_before"] | on["stretch"] | on["rotate_after"] | on["shift"]
        return torch.where(per_image(any_warp), warped, moved)

    def _colour(self, images: Tensor, draws: dict[str, Tensor], on: dict[str, Tensor]) -> Tensor:
        one = torch.ones_like(draws["luma"])
        brightness = torch.where(on["brightness"], BRIGHTNESS_SIGMA * draws["brightness"], 0.0)
        contrast = torch.where(on["contrast"], (CONTRAST_SIGMA * draws["contrast"]).exp(), 1.0)
        luma = torch.where(on["luma"] & (draws["luma"] < 0.5), -one, one)
        any_colour = on["brightness"] | on["contrast"] | on["luma"]
        if self.channels == 1:
            # All of them act along the grey axis, on which hue and saturation have no effect.
            coloured = (images + per_image(brightness)) * per_image(contrast * luma)
            return torch.where(per_image(any_colour), coloured, images)
        hue = torch.where(on["hue"], (2 * draws["hue"] - 1) * math.pi, 0.0)
        saturation = torch.where(on["saturation"], (SATURATION_SIGMA * draws["saturation"]).exp(), 1.0)
        along, across, turned = (m.to(images.dtype) for m in self._axes)
        # Brightness, contrast, luma flip, hue and saturation, in this order, are one matrix.
        across = hue.cos().view(-1, 1, 1) * across + hue.sin().view(-1, 1, 1) * turned
        matrix = contrast.view(-1, 1, 1) * (luma.view(-1, 1, 1) * along + saturation.view(-1, 1, 1) * across)
        shifted = images + per_image(brightness)
        coloured = (matrix @ shifted.flatten(2)).view_as(images)
        return torch.where(per_image(any_colour | on["hue"] | on["saturation"]), coloured, images)

    @torch.no_grad()
    def update(self, d_real_logits: Tensor, images_seen: int) -> None:
        # The sign of a NaN is 0: it says nothing.
        sign = d_real_logits.detach().float().sign().mean()
        if self._exchange is not None:
            self._exchange([sign])
        self._signs += sign
        self._calls += 1
        if self._calls < self.interval:
            return
        mean = self._signs / self._calls
        step = (images_seen - self._images_before) / self.images
        self.r.copy_(mean)
        self.p.add_((mean - self.target).sign(), alpha=step).clamp_(0, 1)
        self._signs.zero_()
        self._calls, self._images_before = 0, images_seen

    def state_dict(self) -> dict[str, Any]:
        tensors = {"p": self.p, "r": self.r, "signs": self._signs}
        numbers = {"calls": self._calls, "images": self._images_before}
        return {**{name: value.cpu().clone() for name, value in tensors.items()}, **numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        # In place: a captured step reads p where it lies.
        for name, tensor in (("p", self.p), ("r", self.r), ("signs", self._signs)):
            tensor.copy_(state[name])
        self._calls, self._images_before = int(state["calls"]), int(state["images"])


def _linear(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """Maps ``[B, 3, 3]`` that keep the centre, from their entries ``[B]``."""
    zero, one = torch.zeros_like(xx), torch.ones_like(xx)
    return torch.stack([xx, xy, zero, yx, yy, zero, zero, zero, one], 1).view(-1, 3, 3)


def _rotation(angle: Tensor) -> Tensor:
    """The inverse of a turn of the picture, seen with y down, by ``angle [B]`` counterclockwise."""
    c, s = angle.cos(), angle.sin()
    return _linear(c, -s, s, c)


def _translation(by: Tensor) -> Tensor:
    zero, one = torch.zeros_like(by[:, 0]), torch.ones_like(by[:, 0])
    return torch.stack([one, zero, by[:, 0], zero, one, by[:, 1], zero, zero, one], 1).view(-1, 3, 3)
