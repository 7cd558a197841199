"""What the trainer needs to know of a network family: how its pairs are described, built, grouped and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

# Name and modules of every group of a network, group 1 at the image's end.
Groups = list[tuple[str, list[str]]]
State = dict[str, Tensor]


class Description(Protocol):
    """Sizes of a pair: a frozen dataclass whose fields are JSON values.

    ``classes`` is the number of labels a network is conditioned on, 0 for none; ``z_dim`` the length of the latent.
    """

    @property
    def arch(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def z_dim(self) -> int: ...
    @property
    def classes(self) -> int: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Conditional:
    """How an unconditional pair of a family becomes a conditional one that computes the same for every label.

    ``describe(source, classes, conditioning)`` gives the new description, ``convert(network, state, description)`` a
    network's tensors under the new names and shapes; network is generator, average or discriminator.
    """

    describe: Callable[[Any, int, str], Description]
    convert: Callable[[str, State, Any], State]


@dataclass(frozen=True)
class Architecture:
    """One family of generator and discriminator pairs.

    A generator has ``z_dim``, ``noise_shapes`` (sides of the noise maps it injects, mostly none), a settable
    ``checkpoint_activations``, and ``pre_tanh(z, y=None, noise=None)``, whose tanh ``forward`` returns: images
    ``[B, channels, size, size]`` in [-1, 1] from ``z [B, z_dim]`` and labels ``y [B]`` (or None).
    One whose images depend on each other outside training too has a true ``batch_statistics``.
    A discriminator has ``checkpoint_activations`` and ``forward(x, y=None)``, one logit ``[B]`` for each image; one
    with an auxiliary classifier also has ``judge(x)``, the logits ``[B]`` and the class logits ``[B, classes]``.

    Fields:
        names: values of ``arch``.
        describe: the description from its JSON fields; ValueError names a bad one.
        generator, discriminator: networks of a description, with the family's own initialisation.
        groups: groups of a network for freezing, image side first; together they hold every parameter once.
        modulated: names of the convolutions that AdaFM modulates in a group's modules.
        infer: description from the published networks' tensors; SourceError where they do not tell.
        rename: one network's published names and layouts in ours; network is generator, discriminator or average.
        loss: adversarial loss the family was published with: nonsat, hinge or wgan-gp.
        label_free: a network conditioned on labels also takes None for them.
        modulate: AdaFM layer in place of one of the family's convolutions; None takes AdaFMConv2d or
            AdaFMConvTranspose2d by the layer's kind.
        conditional: how an unconditional pair becomes conditional; None where the family does not know.
    """

    names: tuple[str, ...]
    describe: Callable[[dict[str, Any]], Description]
    generator: Callable[[Any], nn.Module]
    discriminator: Callable[[Any], nn.Module]
    groups: Callable[[nn.Module, Any], Groups]
    modulated: Callable[[nn.Module, list[str]], list[str]]
    infer: Callable[[str, Mapping[str, State]], Description]
    rename: Callable[[str, State], State]
    loss: str = "nonsat"
    label_free: bool = False
    modulate: Callable[[nn.Module], nn.Module] | None = None
    conditional: Conditional | None = None
