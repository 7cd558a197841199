"""One generator made of several: each sample comes from the one that a critic prefers, or that p or a selector names.

Source: Wang et al., "MineGAN" (CVPR 2020), section 3.3, and the released code for several MNIST generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import SourceError
from .selecting import REDUCTIONS, drawn, selector_loss, updated_probability, winner_frequency

SELECTORS = ("p", "head")
Critic = Callable[[Tensor, Tensor | None], Tensor]


class SelectingMiner(nn.Module):
    """Miner of latents with a classifier of generators on its hidden layer.

    ``forward``: Linear, ReLU, Linear, ``u [B, u_dim] -> [B, z_dim]``. ``selector_logits``: a linear layer on the same
    hidden values, ``[B, count]``. Weights uniform with variance ``2 / (fan_in + fan_out)``, biases 0.
    """

    def __init__(self, u_dim: int, z_dim: int, count: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = z_dim if hidden is None else hidden
        self.input1, self.input2 = nn.Linear(u_dim, hidden), nn.Linear(hidden, z_dim)
        self.selector = nn.Linear(hidden, count)
        for layer in (self.input1, self.input2, self.selector):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, u: Tensor) -> Tensor:
        return self.input2(torch.relu(self.input1(u)))

    def selector_logits(self, u: Tensor) -> Tensor:
        return self.selector(torch.relu(self.input1(u)))


class MultiMinedGenerator(nn.Module):
    """Images ``G_k(M_k(u))`` from latents ``z [B, z_dim]``, k chosen for each sample.

    A latent is ``u_dim`` normal entries for the miner and a last one for the draw of a generator. While a critic is at
    hand, ``select`` names the generators and ``pre_tanh(z, index=...)`` makes the images with gradients; without
    ``index``, k is drawn from the buffer ``p [N]`` (selector p) or is the selector's highest logit for u (head).

    Only the generators and miners that are chosen run, each on its own samples, so the others have no gradients. A
    generator that normalises with the statistics of its batch sees only those samples, and scores of ``select``, which
    runs all of them on every sample, may differ from the critic's of the images that are then made.

    Args:
        generators: with the trainer's interface (``models.architecture.Architecture``) and no noise maps; they must
            agree in the shape of their images and in nothing else. Tried once here, on two latents.
        miners: one for each generator, or a single one for all. ``miner(u)`` is z, or a tuple (z, y) where a generator
            takes a mined embedding in place of its label.
        u_dim: length of a miner's input.
        reduce: sample_max or batch_max, see ``selecting``.
        selector: p, or head: the single miner must then have ``selector_logits(u) [B, N]``.
        rho: step of the estimate ``p``.
        freeze_buffers: while the generators are frozen they stay in eval mode, as in ``MinedGenerator``.

    Raises:
        SourceError: the images differ in shape, or a generator injects noise.
        ValueError: any other argument that cannot be used.
    """

    noise_shapes: tuple[tuple[int, int], ...] = ()

    def __init__(
        self,
        generators: Sequence[nn.Module],
        miners: Sequence[nn.Module] | nn.Module,
        u_dim: int,
        reduce: str = "sample_max",
        selector: str = "p",
        rho: float = 0.05,
        freeze_buffers: bool = True,
    ) -> None:
        super().__init__()
        self.generators = nn.ModuleList(generators)
        self.miners = nn.ModuleList([miners] if isinstance(miners, nn.Module) else miners)
        self._check(u_dim, reduce, selector, rho)
        self.u_dim, self.z_dim, self.reduce, self.selector, self.rho = u_dim, u_dim + 1, reduce, selector, rho
        count = len(self.generators)
        self.register_buffer("p", torch.full((count,), 1 / count, dtype=torch.float64))
        self.image_shape = self._image_shape()
        self.freeze_buffers, self.warming, self.mining = freeze_buffers, False, True
        self.mine()

    @property
    def batch_statistics(self) -> bool:
        return any(getattr(generator, "batch_statistics", False) for generator in self.generators)

    @property
    def checkpoint_activations(self) -> bool:
        return all(generator.checkpoint_activations for generator in self.generators)

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        for generator in self.generators:
            generator.checkpoint_activations = value

    def mine(self) -> None:
        """Stage 1, and how a network starts: no parameter of a generator requires a gradient."""
        self.generators.requires_grad_(False)
        self.mining = True
        self.train(self.training)

    def fine_tune(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Stage 2: the generators' ``parameters`` (None: all of them) require gradients."""
        for p in self.generators.parameters() if parameters is None else parameters:
            p.requires_grad_(True)
        self.mining = False
        self.train(self.training)

    def train(self, mode: bool = True) -> MultiMinedGenerator:
        super().train(mode)
        if self.mining and self.freeze_buffers:
            self.generators.eval()
        return self

    def choose(
        self,
        z: Tensor,
        critic: Critic,
        y: Tensor | None = None,
        parts: Sequence[slice] = (slice(None),),
        exchange: Callable[[list[Tensor]], None] | None = None,
    ) -> Tensor:
        """Generators of latents in training, ``[B]``: the winners, or equal shares while ``warming``.

        ``parts`` are the samples that pass the networks at once. ``exchange`` averages tensors in place over the
        processes that share a batch: what wins by the batch wins by all of it.
        """
        if self.warming:
            return self.uniform(z)
        scores = torch.cat([self.scores(z[part], critic, None if y is None else y[part]) for part in parts])
        if exchange is not None and self.reduce == "batch_max":
            mean = scores.double().mean(0)
            exchange([mean])
            scores = mean.expand(len(z), -1)
        return REDUCTIONS[self.reduce](scores)

    def selection_loss(self, z: Tensor, index: Tensor, share: float = 1.0) -> Tensor | None:
        """What a step's choice ``index [B]`` teaches: moves p, and gives the selector's loss, or None without a head.

        ``share`` of the step's samples are these. Nothing is learned while ``warming``. Without gradients (images for
        the discriminator) p stays too.
        """
        if self.warming or not torch.is_grad_enabled():
            return None
        self.record(self.frequency(index), share)
        return selector_loss(self.selector_logits(z), index) if self.selector == "head" else None

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return torch.tanh(self.pre_tanh(z, y, noise))

    def pre_tanh(
        self,
        z: Tensor,
        y: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The images before tanh, ``[B, C, H, W]``, of generators ``index [B]`` (None: by p or by the selector).

        ``y [B]`` goes to the generators whose miner makes no embedding. Waits for the device once, for the number of
        samples of each generator.
        """
        if noise:
            raise ValueError(f"{len(noise)} noise maps are given; generators that are mined together take none")
        u = self._u(z)
        index = self.index(z) if index is None else index
        if index.shape != z.shape[:1]:
            raise ValueError(f"index has shape {tuple(index.shape)}; expected [{z.shape[0]}], a generator a sample")
        sizes = torch.bincount(index, minlength=len(self.generators)).tolist()
        if len(sizes) > len(self.generators):
            raise ValueError(f"index names generator {len(sizes) - 1}; there are {len(self.generators)}")
        order = torch.argsort(index, stable=True)
        made = [self._made(k, u[part], None if y is None else y[part]) for k, part in _parts(order, sizes)]
        return torch.cat(made)[torch.argsort(order)]

    def index(self, z: Tensor) -> Tensor:
        """Generators of latents ``z [B, z_dim]`` without a critic: int64 ``[B]``."""
        if self.selector == "head":
            return self.selector_logits(z).argmax(1)
        return drawn(self.p, z[:, self.u_dim])

    def uniform(self, z: Tensor) -> Tensor:
        """Generators drawn with equal probability by the last entry of ``z [B, z_dim]``: int64 ``[B]``; for warm-up."""
        return drawn(torch.full_like(self.p, 1 / len(self.generators)), z[:, self.u_dim])

    def selector_logits(self, z: Tensor) -> Tensor:
        """The selector's logits for latents ``z [B, z_dim]``: ``[B, N]``; trained by ``selecting.selector_loss``.

        Raises:
            ValueError: there is no selector head.
        """
        if self.selector != "head":
            raise ValueError(
                f"selector is {self.selector!r}: there is no head; make the generator with selector='head'"
            )
        return self.miners[0].selector_logits(self._u(z))

    def select(self, z: Tensor, critic: Critic, y: Tensor | None = None) -> Tensor:
        """Winners of latents ``z [B, z_dim]`` by their ``scores``: int64 ``[B]``."""
        return REDUCTIONS[self.reduce](self.scores(z, critic, y))

    @torch.no_grad()
    def scores(self, z: Tensor, critic: Critic, y: Tensor | None = None) -> Tensor:
        """``critic(images, y) [B]`` of every generator's images of latents ``z [B, z_dim]``: ``[B, N]``, no gradients.

        Buffers (running statistics, vectors of a spectral norm) of all networks are restored afterwards, those of the
        critic where it is a module.
        """
        u = self._u(z)
        with _buffers_kept(self), _buffers_kept(critic):
            return torch.stack([critic(torch.tanh(self._made(k, u, y)), y) for k in range(len(self.generators))], 1)

    @torch.no_grad()
    def record(self, frequency: Tensor, share: float = 1.0) -> None:
        """Move ``p`` by ``rho`` towards the winners' ``frequency [N]``: after each of the miner's steps, or after each
        part of its samples by as much less, so that all parts leave ``1 - rho`` of what p was."""
        rho = self.rho if share == 1 else 1 - (1 - self.rho) ** share
        self.p.copy_(updated_probability(self.p, frequency, rho))

    def frequency(self, index: Tensor) -> Tensor:
        """Share of each generator among winners ``index [B]``: float64 ``[N]``."""
        return winner_frequency(index, len(self.generators))

    def _u(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; expected [B, {self.z_dim}]: {self.u_dim} entries for the miner, one "
                "for the choice of a generator"
            )
        return z[:, : self.u_dim]

    def _made(self, k: int, u: Tensor, y: Tensor | None) -> Tensor:
        mined = self.miners[k if len(self.miners) > 1 else 0](u)
        z, y = mined if isinstance(mined, tuple) else (mined, y)
        return self.generators[k].pre_tanh(z, y)

    def _check(self, u_dim: int, reduce: str, selector: str, rho: float) -> None:
        count, miners = len(self.generators), len(self.miners)
        if not count:
            raise ValueError("there are no generators; give at least one")
        if miners not in (1, count):
            raise ValueError(f"there are {miners} miners for {count} generators; give one for each, or a single one")
        for name, value, known in (("reduce", reduce, tuple(REDUCTIONS)), ("selector", selector, SELECTORS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if selector == "head" and not (miners == 1 and hasattr(self.miners[0], "selector_logits")):
            raise ValueError("selector='head' needs a single miner with selector_logits, such as SelectingMiner")
        if u_dim < 1:
            raise ValueError(f"u_dim is {u_dim}; it must be at least 1")
        if not 0 < rho < 1:
            raise ValueError(f"rho is {rho}; it must lie between 0 and 1")
        for k, generator in enumerate(self.generators):
            if generator.noise_shapes:
                raise SourceError(f"generator {k} injects noise maps; generators that are mined together must not")

    @torch.no_grad()
    def _image_shape(self) -> tuple[int, ...]:
        like = next(self.generators.parameters())
        u = torch.zeros(2, self.u_dim, dtype=like.dtype, device=like.device)
        with _buffers_kept(self):
            shapes = [tuple(self._made(k, u, None).shape[1:]) for k in range(len(self.generators))]
        for k, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise SourceError(
                    f"generator {k} makes images of {list(shape)}, generator 0 of {list(shapes[0])}; generators that "
                    "are mined together must agree in channels and side"
                )
        return shapes[0]


def _parts(order: Tensor, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Every generator that has samples, and which."""
    for k, part in enumerate(order.split(sizes)):
        if sizes[k]:
            yield k, part


@contextmanager
def _buffers_kept(network: object) -> Iterator[None]:
    """Restore the buffers of ``network`` (running statistics, vectors of a spectral norm), where it is a module."""
    buffers = list(network.buffers()) if isinstance(network, nn.Module) else []
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
