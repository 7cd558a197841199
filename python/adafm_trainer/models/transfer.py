"""What a transfer copies from its source, freezes, modulates and trains, and the table that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear

from ..errors import SourceError
from .architecture import Description
from .catalogue import architecture, build_generator, groups
from .groups import group_parameters

# Modules that copy policy gmdn leaves at random.
LEFT_BY_GMDN = ("embedding", "fc")
COPY_POLICIES = ("all", "gmdn")
BASE_NAMES = ("weight", "bias")
MODULATED = (AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear)


@dataclass(frozen=True)
class CopyReport:
    """Parameter names: ``copied`` from the source; ``left`` as they were; ``unused`` names of the source."""

    copied: tuple[str, ...]
    left: tuple[str, ...]
    unused: tuple[str, ...]

    def summary(self, network: str) -> str:
        """One line for the log."""
        left = f", {len(self.left)} start otherwise ({_brief(self.left)})" if self.left else ""
        return f"{network}: {len(self.copied)} tensors copied from the source{left}"


@torch.no_grad()
def copy_source(module: nn.Module, state: Mapping[str, Tensor], policy: str = "all") -> CopyReport:
    """Copy every tensor of ``state`` whose name ``module`` has, except those the policy excludes.

    Policies: ``all`` excludes nothing; ``gmdn``, the released code's, excludes the modules ``embedding`` and ``fc``, so
    that those start at random. Names of the source that the target lacks (blocks above the join) are not used.

    Raises:
        ValueError: an unknown policy.
        SourceError: a tensor of the same name has another shape, or no name is shared.
    """
    if policy not in COPY_POLICIES:
        raise ValueError(f"copy policy is {policy!r}; expected one of {', '.join(COPY_POLICIES)}")
    target = dict(module.named_parameters())
    target.update(module.named_buffers())
    excluded = LEFT_BY_GMDN if policy == "gmdn" else ()
    shared = [name for name in target if name in state and name.split(".")[0] not in excluded]
    if not shared:
        raise SourceError("the source and the target share no parameter name; is --source of the same family?")
    for name in shared:
        if target[name].shape != state[name].shape:
            raise SourceError(
                f"{name} is {tuple(state[name].shape)} in the source and {tuple(target[name].shape)} in the target; "
                "family, widths, channels and size must agree"
            )
    for name in shared:
        target[name].copy_(state[name])
    taken = set(shared)
    left, unused = (tuple(n for n in names if n not in taken) for names in (target, state))
    return CopyReport(tuple(shared), left, unused)


def freeze(module: nn.Module, cfg: Description, count: int) -> list[str]:
    """Freeze groups 1 to ``count`` from the image side (the m, or n, of GmDn); returns the names of the frozen modules.

    With ``count`` > 0 a generator's embedding is frozen too, as in the released code. Other parameters are left alone.

    Raises:
        ValueError: the network has fewer groups.
    """
    listed = groups(module, cfg)
    if not 0 <= count <= len(listed):
        raise ValueError(f"cannot freeze {count} groups: the {type(module).__name__} has {len(listed)}")
    frozen = [name for _, names in listed[:count] for name in names]
    if count and "embedding" in dict(module.named_children()) and "embedding" not in frozen:
        frozen.append("embedding")
    for _, parameter in group_parameters(module, frozen):
        parameter.requires_grad_(False)
    return frozen


def modulate_blocks(generator: nn.Module, cfg: Description, count: int) -> list[str]:
    """Replace the family's modulated convolutions in groups 1 to ``count`` by AdaFM layers, in place.

    In GP-GAN these are ``conv_0`` and ``conv_1`` of every block, and not ``conv_img`` and ``conv_s``. gamma 1 and beta
    0 leave the generator's output as it is, bit for bit. Weights keep their values, names and ``requires_grad``; biases
    are not modulated. Layers that are modulated already stay.

    Returns:
        Names of the modulated layers.
    """
    listed = groups(generator, cfg)
    if not 0 <= count <= len(listed):
        raise ValueError(f"cannot modulate {count} groups: the {type(generator).__name__} has {len(listed)}")
    family = architecture(cfg.arch)
    modulated = family.modulated(generator, [name for _, names in listed[:count] for name in names])
    for name in modulated:
        layer = generator.get_submodule(name)
        if not isinstance(layer, MODULATED):
            kind = AdaFMConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else AdaFMConv2d
            replaced = kind.from_module(layer, freeze=False) if family.modulate is None else family.modulate(layer)
            generator.set_submodule(name, replaced)
    return modulated


def modulated_state(cfg: Description, state: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """A source generator's tensors after ``modulate_blocks``: under the names, and with the values, of its layers."""
    generator = build_generator(cfg)
    copy_source(generator, state)
    modulate_blocks(generator, cfg, count)
    return generator.state_dict()


def adapter_parameters(module: nn.Module) -> list[str]:
    """Names of what the network's modulated layers have beside weight and bias: gamma, beta, in GAN memory a shift."""
    modulated = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, MODULATED)]
    own = ((name, leaf) for name, layer in modulated for leaf, _ in layer.named_parameters(recurse=False))
    return [f"{name}.{leaf}" for name, leaf in own if leaf not in BASE_NAMES]


def block_table(generator: nn.Module, discriminator: nn.Module, cfg: Description) -> list[dict]:
    """One row for each group of both networks, image side first.

    Keys: network (G or D), group, state, parameters, trainable. State is ``trained`` if a source or head parameter
    requires a gradient, else ``adapter`` if the group holds gamma and beta (also while they are held), else ``frozen``.
    ``trainable`` counts parameters that require a gradient now.
    """
    rows = []
    for network, module in (("G", generator), ("D", discriminator)):
        adapters = set(adapter_parameters(module))
        for number, (name, modules) in enumerate(groups(module, cfg), 1):
            listed = list(group_parameters(module, modules))
            if any(p.requires_grad for n, p in listed if n not in adapters):
                state = "trained"
            else:
                state = "adapter" if any(n in adapters for n, _ in listed) else "frozen"
            rows.append(
                {
                    "network": network,
                    "number": number,
                    "group": name,
                    "state": state,
                    "parameters": sum(p.numel() for _, p in listed),
                    "trainable": sum(p.numel() for _, p in listed if p.requires_grad),
                }
            )
    return rows


def format_block_table(rows: Iterable[dict]) -> str:
    """The block table as text, with totals for each network."""
    rows = list(rows)
    lines = [f"{'':2} {'group':14} {'state':8} {'parameters':>13} {'trainable':>13}"]
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        for row in own:
            label = f"{row['number']} {row['group']}"
            lines.append(f"{network:2} {label:14} {row['state']:8} {row['parameters']:13,} {row['trainable']:13,}")
        total, trainable = (sum(row[key] for row in own) for key in ("parameters", "trainable"))
        lines.append(f"{network:2} {'total':14} {'':8} {total:13,} {trainable:13,}")
    return "\n".join(lines)


def _brief(names: tuple[str, ...], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
