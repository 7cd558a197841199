"""Miners: small networks in front of a generator that move its input to where its images look like the target data.

Source: Wang, Gonzalez-Garcia, Berga, Herranz, Khan and van de Weijer, "MineGAN: effective knowledge transfer from GANs
to target domains with few images" (CVPR 2020). Names of parameters are those of the authors' code. A miner has
``u_dim``, the length of the vector ``u ~ N(0, I)`` that it maps; ``style_miners`` has those of the StyleGAN noise maps
and constant. ``mined.MinedGenerator`` joins a miner and a generator.

Initialisations (``miner_init``):

- identity (default): ``M(u) = u + f(u)`` where the last layer of f is zero: mining starts exactly at the source's
  samples. Where the sizes differ, u's coordinates are repeated in turn (``out > u_dim``) or cut off (``out < u_dim``):
  every coordinate of z starts standard normal, but with repetition they are not independent.
- orthogonal: orthogonal matrices and zero biases; a linear map between equal sizes keeps N(0, I) as it is.
- reference: PyTorch's default, as in the authors' StyleGAN code and their BigGAN code when resumed. The mined codes
  then have a standard deviation of about 0.07 (BigGAN) and 0.19 (StyleGAN): mining starts near a collapse.
- glorot: uniform Glorot and zero biases, as in the authors' MNIST code; MLP only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from .biggan import BigGANGenerator
from .spectral import SpectralLinear, SpectralNorm

MINER_INITS = ("identity", "orthogonal", "reference")


class MLPMiner(nn.Module):
    """Linear, ReLU, Linear: ``u [B, u_dim] -> z [B, z_dim]``; a list of codes gives the list of their images.

    The miner of the StyleGAN and StyleGAN2 code (``u_dim = hidden = z_dim = 512``) and of the MNIST code
    (``u_dim`` 4, ``hidden = z_dim``). StyleGAN's style mixing passes each of its two codes through it.

    Args:
        hidden: width between the layers; None is ``z_dim``.
        init: identity, orthogonal, reference or glorot.
    """

    def __init__(self, u_dim: int, z_dim: int, hidden: int | None = None, init: str = "identity") -> None:
        super().__init__()
        hidden = z_dim if hidden is None else hidden
        _check_sizes(u_dim=u_dim, z_dim=z_dim, hidden=hidden)
        _check_init(init, (*MINER_INITS, "glorot"))
        self.u_dim, self.z_dim, self.residual = u_dim, z_dim, init == "identity"
        self.transform = nn.Sequential(nn.Linear(u_dim, hidden), nn.ReLU(), nn.Linear(hidden, z_dim))
        if init == "orthogonal":
            _matrices(self, nn.init.orthogonal_)
        elif init == "glorot":
            _matrices(self, nn.init.xavier_uniform_)
        elif init == "identity":
            _zero(self.transform[2])

    @overload
    def forward(self, u: Tensor) -> Tensor: ...
    @overload
    def forward(self, u: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, u: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        if not isinstance(u, Tensor):
            return [self(code) for code in u]
        check_input(u, self.u_dim)
        z = self.transform(u)
        return z + repeated(u, self.z_dim) if self.residual else z


class BigGANMiner(nn.Module):
    """``u [B, z_dim]`` to ``(z [B, z_dim], embedding [B, shared_dim])``, both affine in u, without activation.

    Two branches of four spectrally normalised linear layers: linear to linear4 for z, linear5 to linear8 for the class
    embedding that takes the place of a label. In train mode every forward moves the vectors of the norms. The authors'
    state dictionaries load; their unused ``shared.weight`` is passed over.

    With init identity ``z = u + f(u)``, and linear4 and linear8 are plain linear layers that start at zero (a
    normalised layer cannot be zero: its norm is always 1), linear8 with the bias ``embedding``. Every sample then
    starts at the source's latent and at that class embedding.

    Args:
        embedding: ``[shared_dim]``, where the class branch starts with init identity: mostly the mean over the classes.
        norm: settings of the spectral norm.
        init: identity, orthogonal or reference.
    """

    def __init__(
        self,
        z_dim: int,
        shared_dim: int,
        init: str = "identity",
        embedding: Tensor | None = None,
        norm: SpectralNorm | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(z_dim=z_dim, shared_dim=shared_dim)
        _check_init(init, MINER_INITS)
        self.u_dim, self.z_dim, self.shared_dim, self.residual = z_dim, z_dim, shared_dim, init == "identity"
        norm = SpectralNorm() if norm is None else norm
        for i, name in enumerate(_BRANCHES):
            out = shared_dim if i == 7 else z_dim
            plain = self.residual and i in (3, 7)
            self.add_module(name, nn.Linear(z_dim, out) if plain else SpectralLinear(z_dim, out, norm=norm))
        if init != "reference":
            _matrices(self, nn.init.orthogonal_)
        if self.residual:
            if embedding is None or embedding.shape != (shared_dim,):
                found = None if embedding is None else tuple(embedding.shape)
                raise ValueError(f"embedding is {found}; init identity needs one class embedding [{shared_dim}]")
            _zero(self.linear4)
            _zero(self.linear8)
            with torch.no_grad():
                self.linear8.bias.copy_(embedding)
        self.register_load_state_dict_pre_hook(_drop_unused)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        check_input(u, self.u_dim)
        z = y = u
        for name in _BRANCHES[:4]:
            z = self.get_submodule(name)(z)
        for name in _BRANCHES[4:]:
            y = self.get_submodule(name)(y)
        return (u + z if self.residual else z), y


_BRANCHES = ("linear", *(f"linear{i}" for i in range(2, 9)))


def miner_for(
    generator: nn.Module, init: str = "identity", u_dim: int | None = None, hidden: int | None = None
) -> MLPMiner | BigGANMiner:
    """The miner that fits ``generator``, on its device and in its type.

    A BigGAN with a shared class embedding gets a BigGANMiner, whose class branch starts at the mean embedding; it takes
    u of the latent's length. Any other generator that has ``z_dim`` gets an MLPMiner.

    Raises:
        ValueError: ``u_dim`` or ``hidden`` was given for a BigGAN, or is no size; an unknown ``init``.
    """
    like = next(generator.parameters())
    if isinstance(generator, BigGANGenerator) and generator.cfg.shared_dim:
        cfg = generator.cfg
        if hidden is not None or u_dim not in (None, cfg.z_dim):
            raise ValueError(
                f"u_dim is {u_dim} and hidden {hidden}; the miner of a BigGAN has the size of its latent, {cfg.z_dim}, "
                "throughout: leave both out"
            )
        mean = generator.shared.weight.detach().mean(0).cpu()
        miner: MLPMiner | BigGANMiner = BigGANMiner(cfg.z_dim, cfg.shared_dim, init, mean, cfg.norm)
    else:
        miner = MLPMiner(generator.z_dim if u_dim is None else u_dim, generator.z_dim, hidden, init)
    return miner.to(device=like.device, dtype=like.dtype)


def repeated(u: Tensor, length: int) -> Tensor:
    """``u [B, n]`` to ``[B, length]``: its coordinates in turn, over and over, or its first ones."""
    times = -(-length // u.shape[1])
    return u.repeat(1, times)[:, :length] if times > 1 else u[:, :length]


def check_input(u: Tensor, u_dim: int) -> None:
    """Raise ValueError unless ``u`` is ``[B, u_dim]``."""
    if u.dim() != 2 or u.shape[1] != u_dim:
        raise ValueError(f"the miner's input has shape {tuple(u.shape)}; expected [B, {u_dim}]")


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _check_init(init: str, known: Sequence[str]) -> None:
    if init not in known:
        raise ValueError(f"miner_init is {init!r}; expected one of {', '.join(known)}")


def _matrices(module: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    """Fill every weight of the linear layers by ``fill``; biases become zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            fill(layer.weight)
            nn.init.zeros_(layer.bias)


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _drop_unused(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    state.pop(f"{prefix}shared.weight", None)
