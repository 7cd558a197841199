"""A miner in front of a generator, as one network for the trainer: MineGAN's G(M(u)) and its two stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class MinedGenerator(nn.Module):
    """``G(M(u))`` from ``u [B, z_dim]``: the interface of a generator (``models.architecture``) with the miner's input.

    A miner that gives ``(z, embedding)`` replaces the latent and the class jointly, and labels are not used; one that
    gives z alone leaves the labels to the generator. Tensors of the state dictionary are under ``miner.`` and
    ``generator.``.

    ``mine()``, the first stage, freezes the generator and is how a network starts; ``fine_tune()``, the second,
    releases it. With ``freeze_buffers`` the generator stays in eval mode while it is frozen, whatever ``train()`` says:
    batch norms use their stored statistics and neither these nor the vectors of spectral norms move, so the source
    generator is untouched bit for bit. Without, it follows ``train()`` as in the authors' code, and its buffers move.
    The stage is not part of the state dictionary: set it again after loading.
    """

    def __init__(self, miner: nn.Module, generator: nn.Module, freeze_buffers: bool = True) -> None:
        super().__init__()
        self.miner, self.generator, self.freeze_buffers = miner, generator, freeze_buffers
        self.z_dim: int = miner.u_dim
        self.mining = True
        self.mine()

    @property
    def noise_shapes(self) -> tuple[tuple[int, int], ...]:
        return self.generator.noise_shapes

    @property
    def batch_statistics(self) -> bool:
        return getattr(self.generator, "batch_statistics", False)

    @property
    def checkpoint_activations(self) -> bool:
        return self.generator.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.generator.checkpoint_activations = value

    def mine(self) -> None:
        """Stage 1: no parameter of the generator requires a gradient."""
        self.generator.requires_grad_(False)
        self.mining = True
        self.train(self.training)

    def fine_tune(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Stage 2: the generator's ``parameters`` (None: all of them) require gradients, and it follows ``train()``.

        Raises:
            ValueError: a parameter that is not the generator's.
        """
        own = list(self.generator.parameters())
        released = own if parameters is None else list(parameters)
        known = {id(p) for p in own}
        if foreign := [tuple(p.shape) for p in released if id(p) not in known]:
            raise ValueError(f"{len(foreign)} of the parameters to train are not the generator's; shapes {foreign[:3]}")
        for p in released:
            p.requires_grad_(True)
        self.mining = False
        self.train(self.training)

    def train(self, mode: bool = True) -> MinedGenerator:
        super().train(mode)
        if self.mining and self.freeze_buffers:
            self.generator.eval()
        return self

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return torch.tanh(self.pre_tanh(z, y, noise))

    def pre_tanh(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The image before tanh, ``[B, channels, size, size]``, of the mined latents of ``z [B, z_dim]``."""
        mined = self.miner(z)
        if isinstance(mined, tuple):
            mined, y = mined
        return self.generator.pre_tanh(mined, y, noise)
