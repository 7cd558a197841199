"""Published checkpoints of GP-GAN and AdaFM: read without running any code in them, sizes inferred, names compared."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import SourceError
from .config import GPGAN_FAMILIES, SIDE_FACTORS, ModelConfig
from .names import state_from_reference
from .plan import Plan, discriminator_plan, generator_plan, join_shape

NETWORKS = ("generator", "discriminator", "generator_test")
# Names that other code stores a network under.
_ALIASES = {"netG_state_dict": "generator", "netD_state_dict": "discriminator"}
_WIDTH_UNITS = {"resnet2": 16, "resnet3": 32, "resnet4": 16}


@dataclass(frozen=True)
class Checkpoint:
    """State dictionaries by name (``module.`` removed, our parameter names) and what else the file held.

    ``networks`` has some of generator, discriminator and generator_test (the weight average); ``ignored`` maps the
    other entries to a short description.
    """

    networks: dict[str, dict[str, Tensor]]
    ignored: dict[str, str]


@dataclass(frozen=True)
class LoadReport:
    """Outcome of loading one state dictionary: parameter names, and both shapes for each mismatch."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def lines(self, network: str) -> list[str]:
        """The report as text, one line for each name that is not loaded."""
        counts = (
            f"{network}: {len(self.loaded)} loaded, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.mismatched)} mismatched"
        )
        listed = [f"  missing     {name}" for name in self.missing]
        listed += [f"  unexpected  {name}" for name in self.unexpected]
        listed += [
            f"  mismatched  {name}: {list(found)} in the file, {list(expected)} in the network"
            for name, found, expected in self.mismatched
        ]
        return [counts, *listed]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.safetensors`` or ``.npz`` file, or a pickled checkpoint of any PyTorch version.

    Entries are one state dictionary per network; a file that is itself a state dictionary counts as the generator.
    Pickles pass PyTorch's allow-list unpickler (tensors, containers, NumPy scalars): nothing else in them is executed.

    Raises:
        SourceError: no such file, not a checkpoint, a pickle that asks for code (the message names the global), or no
            network in it.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    entries = _READERS.get(path.suffix, _read_pickle)(path)
    if not isinstance(entries, Mapping):
        raise SourceError(f"{path} holds a {type(entries).__name__}; expected a dictionary of networks")
    if entries and not any(name in entries for name in (*NETWORKS, *_ALIASES)) and _is_state(entries):
        entries = {"generator": entries}
    entries = {_ALIASES.get(name, name): value for name, value in entries.items()}
    networks = {name: _state(path, name, entries[name]) for name in NETWORKS if name in entries}
    if not networks:
        raise SourceError(f"{path} holds no {', '.join(NETWORKS)}; its entries are {', '.join(map(str, entries))}")
    ignored = {str(name): _describe(value) for name, value in entries.items() if name not in NETWORKS}
    return Checkpoint(networks, ignored)


def infer_config(arch: str, networks: Mapping[str, Mapping[str, Tensor]], base: str = "resnet2") -> ModelConfig:
    """Sizes of a checkpoint's networks from the shapes of their tensors.

    Args:
        arch: family; it cannot be told from the shapes with certainty.
        base: family of the source, for arch adafm.

    Raises:
        ValueError: an unknown ``arch``.
        SourceError: a tensor that tells a size is absent, or the sizes do not belong to ``arch``.
    """
    generator = networks.get("generator", networks.get("generator_test"))
    if generator is None:
        raise SourceError("the checkpoint holds no generator, so the sizes of its networks cannot be told")
    discriminator = networks.get("discriminator")
    if arch not in (*GPGAN_FAMILIES, "adafm"):
        raise ValueError(f"arch is {arch!r}; expected one of {', '.join((*GPGAN_FAMILIES, 'adafm'))}")
    try:
        if arch == "adafm":
            return _infer_adafm(generator, discriminator, base)
        return _infer_gpgan(arch, generator, discriminator)
    except KeyError as error:
        raise SourceError(f"the generator has no {error.args[0]}; is it really of --arch {arch}?") from error
    except (ValueError, IndexError) as error:
        raise SourceError(f"the generator's shapes do not fit --arch {arch}: {error}") from error


@torch.no_grad()
def load_matching(module: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """Copy every tensor of ``state`` that has its name and shape in ``module``; report the rest and leave it alone."""
    own = module.state_dict()
    loaded, mismatched = [], []
    for name in own:
        if name not in state:
            continue
        if own[name].shape != state[name].shape:
            mismatched.append((name, tuple(state[name].shape), tuple(own[name].shape)))
            continue
        own[name].copy_(state[name])
        loaded.append(name)
    missing = tuple(name for name in own if name not in state)
    unexpected = tuple(name for name in state if name not in own)
    return LoadReport(tuple(loaded), missing, unexpected, tuple(mismatched))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        flat = load_file(path)
    except SafetensorError as error:
        raise SourceError(f"{path} is not a safetensors file: {error}") from error
    entries: dict[str, Any] = {}
    for name, value in flat.items():
        network, _, rest = name.partition(".")
        if network in NETWORKS and rest:
            entries.setdefault(network, {})[rest] = value
        else:
            entries[name] = value
    return entries


def _read_pickle(path: Path) -> Any:
    # Counters such as the best score are NumPy scalars in files of that age; making one runs no code of the file's.
    scalar, dtypes = np.float64(0).__reduce__()[0], [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    allowed = [np.dtype, *dtypes, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise SourceError(
                f"{path} asks for {found.group(1)}, which is code and not a tensor; it was not executed. "
                "Only checkpoints of plain state dictionaries are read"
            ) from error
        raise SourceError(f"{path} cannot be read as a checkpoint: {error}") from error
    except (EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise SourceError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays by name, as the variables of a TensorFlow checkpoint are exported; object arrays are refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"{path} cannot be read as arrays: {error}") from error


_READERS: dict[str, Callable[[Path], Any]] = {".safetensors": _read_safetensors, ".npz": _read_npz}


def _is_state(entries: Mapping) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries.items())


def _state(path: Path, network: str, entry: Any) -> dict[str, Tensor]:
    if not isinstance(entry, Mapping) or not _is_state(entry):
        raise SourceError(f"{path}: entry {network!r} is not a state dictionary of tensors")
    return state_from_reference({name.removeprefix("module."): value for name, value in entry.items()})


def _describe(value: Any) -> str:
    if isinstance(value, Mapping) and "param_groups" in value:
        return "optimizer state"
    if isinstance(value, (bool, int, float, str)):
        return str(value)
    return type(value).__name__


def _infer_gpgan(arch: str, generator: Mapping[str, Tensor], discriminator: Mapping[str, Tensor] | None) -> ModelConfig:
    channels, nf = generator["conv_img.weight"].shape[:2]
    rows, columns = generator["fc.weight"].shape
    nlabels, embed = generator["embedding.weight"].shape if "embedding.weight" in generator else (1, 0)
    if not embed and discriminator is not None:
        nlabels = discriminator["fc.weight"].shape[0]
    if arch == "resnet":
        blocks = [int(found.group(1)) for name in generator if (found := re.match(r"resnet\.(\d+)\.", name))]
        size = 4 * 2 ** (max(blocks, default=0) // 2)
    else:
        size = SIDE_FACTORS[arch] * _square_side(rows, _WIDTH_UNITS[arch] * nf, "fc.weight")
    cfg = ModelConfig(arch, size, channels, nf, None, columns - embed, embed, nlabels)
    if arch == "resnet":
        return _with_limit(cfg, lambda plan: plan.width, rows // 16, discriminator)
    return cfg


def _infer_adafm(generator: Mapping[str, Tensor], discriminator: Mapping[str, Tensor] | None, base: str) -> ModelConfig:
    channels, nf = generator["conv_img.weight"].shape[:2]
    style_dim, z_dim = generator["small_style.1.linear.weight"].shape
    nlabels, embed = generator["small_embedding.weight"].shape if "small_embedding.weight" in generator else (1, 0)
    join_width, join_side = generator["small_H.weight"].shape[1], generator["small_H.norm.weight"].shape[0]
    stages = {found.group(1) for name in generator if (found := re.match(r"resnet[._](\d+)[._]", name))}
    keep = len(stages) + 1
    # One doubling before each kept stage, except before the network's very first; resnet3 doubles once more at the end.
    doublings = len(stages) - ("0" in stages) + (base == "resnet3")
    cfg = ModelConfig(
        arch="adafm",
        size=join_side * 2**doublings,
        channels=channels,
        nf=nf,
        z_dim=z_dim,
        embed=embed,
        nlabels=nlabels,
        base=base,
        keep=keep,
        style_dim=style_dim,
        s0=_square_side(generator["small_fc.weight"].shape[0], join_width, "small_fc.weight"),
    )
    if base == "resnet":
        return _with_limit(cfg, lambda plan: join_shape(plan, keep)[0], join_width, discriminator)
    return cfg


def _with_limit(
    cfg: ModelConfig, width_of: Callable[[Plan], int], width: int, discriminator: Mapping[str, Tensor] | None
) -> ModelConfig:
    """``cfg`` of family resnet with the width limit that gives both networks the widths found; first the default."""
    wide = width if discriminator is None else discriminator["fc.weight"].shape[1] // 16
    for nf_max in (None, width, wide):
        limited = dataclasses.replace(cfg, nf_max=nf_max)
        fits = discriminator is None or discriminator_plan(limited).width == wide
        if fits and width_of(generator_plan(limited)) == width:
            return limited
    return dataclasses.replace(cfg, nf_max=width)


def _square_side(rows: int, width: int, name: str) -> int:
    side = math.isqrt(rows // width)
    if side < 1 or width * side**2 != rows:
        raise ValueError(f"{name} has {rows} rows, which is not {width} times a square")
    return side
