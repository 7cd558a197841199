"""Published BigGAN tensors: the description of a pair from their names and shapes, and their names in ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import SourceError
from .architecture import State
from .biggan_config import BOTTOM, LEAST_ATTENDED, SIZES, BigGANConfig

_NETWORKS = ("average", "generator")


def rename(network: str, state: State) -> State:
    """Published names in ours: they are the same but for the ``module.`` of a network saved from several devices."""
    prefix = "module."
    return {name.removeprefix(prefix): value for name, value in state.items()}


def infer(arch: str, networks: Mapping[str, State]) -> BigGANConfig:
    """Description of the pair in ``networks`` (generator or average, and a discriminator where there is one).

    Without a discriminator its width and, where its maps allow, its attention are taken to be the generator's. The
    shapes do not tell ``sn_eps``, ``bn_eps``, ``sn_iterations`` and ``init``, which take their defaults.

    Raises:
        SourceError: no generator, an absent tensor, or shapes that belong to no BigGAN.
    """
    generator = next((networks[name] for name in _NETWORKS if name in networks), None)
    if generator is None:
        raise SourceError("the checkpoint holds no generator, so the sizes of its networks cannot be told")
    discriminator = networks.get("discriminator")
    try:
        return _infer(arch, generator, discriminator)
    except KeyError as error:
        raise SourceError(f"the checkpoint has no tensor {error.args[0]}; is it really of --arch {arch}?") from error
    except (ValueError, IndexError) as error:
        raise SourceError(f"the checkpoint's shapes do not fit --arch {arch}: {error}") from error


def _infer(arch: str, generator: State, discriminator: State | None) -> BigGANConfig:
    blocks = _count(generator)
    size = BOTTOM << blocks
    if size not in SIZES:
        raise ValueError(f"the generator has {blocks} blocks; arch biggan has 3 to 6")
    first, chunk = generator["linear.weight"].shape
    gain = generator["blocks.0.0.bn1.gain.weight"].shape
    if "shared.weight" in generator:
        classes, shared = generator["shared.weight"].shape
        hier = gain[1] > shared
        if hier and gain[1] != shared + chunk:
            raise ValueError(
                f"blocks.0.0.bn1.gain.weight takes {gain[1]} values; expected {shared} of the embedding and {chunk}"
                " of z"
            )
    else:
        classes, shared, hier = gain[0], 0, False
    ch = _divided(first // BOTTOM**2, 4 if size == 32 else 16, "linear.weight")
    described = {
        "arch": arch,
        "size": size,
        "channels": generator["output_layer.2.weight"].shape[0],
        "ch": ch,
        "z_dim": chunk * (blocks + 1) if hier else chunk,
        "classes": classes,
        "shared_dim": shared,
        "hier": hier,
        "sn_values": sum(re.fullmatch(r"linear\.u\d+", name) is not None for name in generator),
    }
    bare = BigGANConfig(**described, g_attention=(), d_attention=())
    sides = [block.side for block in bare.generator_blocks()]
    attended = _attention(generator, sides)
    if discriminator is None:
        wide = {block.side for block in bare.discriminator_blocks() if block.fout >= LEAST_ATTENDED}
        return BigGANConfig(**described, g_attention=attended, d_attention=tuple(s for s in attended if s in wide))
    listed = bare.discriminator_blocks()
    if _count(discriminator) != len(listed):
        raise ValueError(
            f"the discriminator has {_count(discriminator)} blocks; that of a generator of {size} pixels {len(listed)}"
        )
    width = discriminator["blocks.0.0.conv1.weight"].shape[0]
    d_ch = _divided(width, 4 if size == 32 else 1, "blocks.0.0.conv1.weight")
    return BigGANConfig(
        **described,
        d_ch=None if d_ch == ch else d_ch,
        g_attention=attended,
        d_attention=_attention(discriminator, [block.side for block in listed]),
    )


def _count(state: Mapping[str, Tensor]) -> int:
    numbers = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.0\.", name))]
    if not numbers:
        raise KeyError("blocks.0.0.conv1.weight")
    return max(numbers) + 1


def _attention(state: Mapping[str, Tensor], sides: list[int]) -> tuple[int, ...]:
    found = [side for i, side in enumerate(sides) if f"blocks.{i}.1.theta.weight" in state]
    if found != [side for side in sides if side in found]:
        raise ValueError("attention follows only some of the blocks whose maps have one side")
    return tuple(dict.fromkeys(found))


def _divided(width: int, factor: int, name: str) -> int:
    if width % factor:
        raise ValueError(f"{name} makes {width} channels, which is no multiple of {factor}")
    return width // factor
