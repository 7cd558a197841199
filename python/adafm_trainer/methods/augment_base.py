"""What every augmentation of D's input is: parameters drawn by key, a transform of images, and state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import keyed

# One row of numbers for each image, float32 [B, K]. ``draws[part]`` belongs to ``images[part]``.
Draws: TypeAlias = Tensor


class Augment(ABC):
    """An augmentation of the images that the discriminator judges, real and generated, in both networks' steps.

    ``draw`` makes the parameters of one pass, and the call applies them. An augmentation is a differentiable function
    of the images, of any order: a gradient penalty may be taken at the images before it. Nothing in it waits for the
    device, so a step with it can be captured in a CUDA graph, for which the draws are an input like the images.

    Args:
        channels, size: of the images ``[B, channels, size, size]``. device: where images and draws lie.

    Raises:
        ValueError: a channel count or a size that the transforms have no meaning for.
    """

    name: str
    uniforms: tuple[str, ...] = ()
    """Names of the columns of ``Draws`` that are uniform in [0, 1)."""
    normals: tuple[str, ...] = ()
    """Names of the columns after them, which are standard normal."""
    channel_counts: tuple[int, ...] = ()
    """Channel counts the transforms have a meaning for; empty for any."""
    least_size = 1

    def __init__(self, channels: int, size: int, device: torch.device | str = "cpu") -> None:
        if self.channel_counts and channels not in self.channel_counts:
            known = " or ".join(map(str, self.channel_counts))
            raise ValueError(f"--aug {self.name} takes images of {known} channels, not {channels}; take another --aug")
        if size < self.least_size:
            raise ValueError(f"--aug {self.name} takes images of {self.least_size} pixels at least, not {size}")
        self.channels, self.size, self.device = channels, size, torch.device(device)

    def draw(self, seed: int, step: int, indices: Sequence[int], which: str) -> Draws:
        """Numbers for the images of one pass, float32 ``[len(indices), K]`` on the augmentation's device.

        Each row is a function of (seed, step, sample index, ``which``) alone. ``which`` names the pass, say "real",
        "fake" or "generator"; passes of different names are independent.
        """
        stream, rows = f"augment/{self.name}/{which}", [int(i) for i in indices]
        uniform = keyed.uniform(seed, f"{stream}/uniform", step, rows, (len(self.uniforms),))
        normal = keyed.normal(seed, f"{stream}/normal", step, rows, (len(self.normals),))
        return torch.cat([uniform, normal], 1).to(self.device)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Transform ``images [B, C, size, size]`` in [-1, 1] by ``draws [B, K]``: same shape, dtype and layout.

        Computed in float32, or in float64 for float64 images, outside of autocast. Values may leave [-1, 1].

        Raises:
            ValueError: images of another shape, or draws that are not one row for each image.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (self.channels, self.size, self.size):
            expected = f"[B, {self.channels}, {self.size}, {self.size}]"
            raise ValueError(f"--aug {self.name} was made for images {expected}, got {list(images.shape)}")
        columns = len(self.uniforms) + len(self.normals)
        if tuple(draws.shape) != (len(images), columns):
            raise ValueError(
                f"--aug {self.name} takes draws [{len(images)}, {columns}] for {len(images)} images, "
                f"got {list(draws.shape)}; make them with draw() for the same samples"
            )
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        with torch.autocast(images.device.type, enabled=False):
            numbers = dict(zip((*self.uniforms, *self.normals), draws.to(dtype).unbind(1), strict=True))
            out = self.transform(images.to(dtype), numbers).to(images.dtype)
        last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        return out.contiguous(memory_format=torch.channels_last) if last else out

    @abstractmethod
    def transform(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """The transform itself, of ``images`` by the columns of their draws ``[B]``, all of one floating type."""

    def update(self, d_real_logits: Tensor, images_seen: int) -> None:  # noqa: B027
        """Take note of what D said to the (augmented) real images of a step, ``[B]``.

        ``images_seen`` counts the real images of the whole run so far, over all processes, with this step's. To be
        called once a step.
        """

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs: tensors on the CPU, and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            ValueError: the state of another augmentation.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(
                f"the saved state of the augmentation holds {sorted(state)}, --aug {self.name} expects "
                f"{sorted(expected)}; resume with the --aug of the run"
            )


def per_image(values: Tensor) -> Tensor:
    """``[B]`` in the shape that broadcasts over ``[B, C, H, W]``."""
    return values.view(-1, 1, 1, 1)
