"""GAN memory: a GP-GAN pair whose normalised filters stay frozen and carry one modulation for each task.

Source: Cong, Zhao, Li, Wang and Carin, "GAN Memory with No Forgetting", NeurIPS 2020: equation 4 and its use in 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adafm_kernels import modulate_normalized

from ..errors import SourceError
from .architecture import Architecture, Groups, State
from .blocks import ResBlock
from .config import SIDE_FACTORS, ModelConfig
from .families import modulated_convolutions
from .gpgan import Discriminator, Generator, labels, run_stages
from .groups import check_groups
from .memory_config import PUBLISHED_EMBEDDING, MemoryConfig
from .memory_layers import RowLinear, ShiftedConv2d
from .memory_lowrank import LowRankConv2d
from .memory_names import state_from_reference
from .plan import discriminator_plan, generator_plan, join_stage

# A deviation below this is replaced by it: a constant kernel has none.
LEAST_DEVIATION = 1e-8
_MODULATED = (ShiftedConv2d, RowLinear, LowRankConv2d)
_WIDTH_UNITS = 16


class MemoryGenerator(Generator):
    """A GP-GAN generator with modulated ``fc``, ``conv_0`` and ``conv_1``: images ``[B, channels, size, size]``.

    With ``cfg.classes`` a label adds its row of ``class_bias`` to the linear layer's output, and the source sees one
    embedding only. Trained are gammas, betas, shifts and ``class_bias``; everything else is frozen. Otherwise as
    ``Generator``. Any order of differentiation.
    """

    # Whether the step that runs is one of those with a rank penalty; the method says so before each.
    rank_penalty_due = False

    def __init__(self, cfg: MemoryConfig) -> None:
        super().__init__(cfg.source)
        self.memory = cfg
        if cfg.embedding is not None:
            del self.embedding
        self.fc = RowLinear.from_module(self.fc, shift=not cfg.classes)
        self.class_bias = nn.Linear(cfg.classes, self.fc.out_features) if cfg.classes else None
        if cfg.classes and cfg.class_init == "zero":
            nn.init.zeros_(self.class_bias.weight)
            nn.init.zeros_(self.class_bias.bias)
        _modulate_blocks(self, cfg.components)
        _train_modulation(self)

    def activations_at_join(self, z: Tensor, y: Tensor | None = None, keep: int = 4) -> Tensor:
        """The map that enters the ``keep`` image-side groups (before the upsampling that precedes them)."""
        if self.class_bias is None:
            return super().activations_at_join(z, y, keep)
        classes = F.one_hot(labels(z, y), self.memory.classes).to(z.dtype)
        h = self.fc(self._input(z, self._embedding(z))) + self.class_bias(classes)
        h = h.view(-1, self.plan.width, self.plan.side, self.plan.side)
        return run_stages(self, self.plan, h, 0, join_stage(self.plan, keep))

    def _embedding(self, z: Tensor) -> Tensor | None:
        """The embedding every sample gets, whatever its class: ``[B, embed]``, or None where the source has none."""
        source = self.cfg
        if not source.embed:
            return None
        if self.memory.embedding is None:
            return self.embedding.weight[:1].expand(z.shape[0], -1)
        return z.new_full((z.shape[0], source.embed), self.memory.embedding)


class MemoryDiscriminator(Discriminator):
    """A GP-GAN discriminator with modulated ``conv_0`` and ``conv_1`` and a trained ``fc``: one logit for each image.

    With ``cfg.classes`` there are as many logits, of which the label takes its own. Any order of differentiation.
    """

    def __init__(self, cfg: MemoryConfig) -> None:
        super().__init__(cfg.source)
        self.memory = cfg
        if cfg.classes and cfg.classes != cfg.source.nlabels:
            self.fc = nn.Linear(self.fc.in_features, cfg.classes)
        _modulate_blocks(self, {})
        _train_modulation(self)
        self.fc.requires_grad_(True)


@torch.no_grad()
def load_source(network: MemoryGenerator | MemoryDiscriminator, state: Mapping[str, Tensor]) -> list[str]:
    """Take over a source's weights, normalise the filters that ``network`` modulates, and set every modulation to what
    was taken out; returns the names of the tensors that the source does not give.

    The function right after is the source's, to rounding, where the source gives everything: not with a ``class_bias``
    that is not zero, a constant embedding that is not the source's, or a D with logits for other classes. There a
    single logit of the source becomes each class's; logits of several classes stay random, as do all with the published
    start (``class_init`` uniform).

    Raises:
        SourceError: a tensor is missing in ``state`` or has another shape.
    """
    state = dict(state)
    own, modulation = network.state_dict(), set(modulation_parameters(network))
    if isinstance(network, MemoryDiscriminator) and network.memory.classes and "fc.weight" in state:
        logits, classes = state["fc.weight"].shape[0], network.memory.classes
        if network.memory.class_init == "uniform" or logits not in (1, classes):
            modulation |= {"fc.weight", "fc.bias"}
        else:
            state |= {name: state[name].expand(classes, *state[name].shape[1:]) for name in ("fc.weight", "fc.bias")}
    needed = [name for name in own if name not in modulation]
    if missing := [name for name in needed if name not in state]:
        raise SourceError(
            f"the source has no {', '.join(missing[:3])} ({len(missing)} tensors are missing); a GAN memory is made "
            "of a whole GP-GAN pair"
        )
    for name in needed:
        if own[name].shape != state[name].shape:
            raise SourceError(
                f"{name} is {tuple(state[name].shape)} in the source and {tuple(own[name].shape)} in the memory; "
                "family, size, channels, nf, z_dim and embed must agree"
            )
    for name in needed:
        own[name].copy_(state[name])
    normalised = isinstance(network, MemoryGenerator) or network.memory.normalise_d
    for _, layer in modulated_layers(network):
        _normalise(layer) if normalised else layer.reset_modulation()
    return [name for name in own if name not in needed]


def modulated_layers(network: nn.Module) -> Iterator[tuple[str, ShiftedConv2d | RowLinear | LowRankConv2d]]:
    """Names and modules of the layers with a modulation, in the network's order."""
    return ((name, module) for name, module in network.named_modules() if isinstance(module, _MODULATED))


def modulation_parameters(network: nn.Module) -> list[str]:
    """Names of all that belongs to tasks and not to the source (stored components as well), D's ``fc`` left out."""
    names = []
    for prefix, layer in modulated_layers(network):
        own = (name for name, _ in layer.named_parameters() if name not in ("weight", "bias"))
        names += [f"{prefix}.{name}" for name in own]
    return names + [name for name, _ in network.named_parameters() if name.startswith("class_bias.")]


def task_parameters(network: nn.Module) -> list[str]:
    """Names of all that a task stores: the modulation, and D's ``fc``."""
    names = modulation_parameters(network)
    return [*names, "fc.weight", "fc.bias"] if isinstance(network, MemoryDiscriminator) else names


def memory_groups(module: nn.Module, cfg: MemoryConfig) -> Groups:
    """Name and modules of every group, image side first, as ``gpgan_groups`` counts those of the source."""
    if isinstance(module, MemoryDiscriminator):
        stages, last = discriminator_plan(cfg.source).stages, ["fc"]
    else:
        stages = tuple(reversed(generator_plan(cfg.source).stages))
        present = dict(module.named_children())
        last = ["fc", *(name for name in ("embedding", "class_bias") if present.get(name) is not None)]
    found = [("conv_img", ["conv_img"])]
    for stage in stages:
        name = stage[0].name
        found.append((name if "." in name else name.rpartition("_")[0], [block.name for block in stage]))
    found.append(("fc", last))
    check_groups(module, found)
    return found


def _infer(arch: str, networks: Mapping[str, State]) -> MemoryConfig:
    """Sizes of a released pair, whose source is of family resnet4, from tensors under our names."""
    generator = networks.get("generator", networks.get("average"))
    if generator is None:
        raise SourceError(f"there is no generator, from which the sizes of --arch {arch} are told")
    try:
        channels, nf = generator["conv_img.weight"].shape[:2]
        rows, columns = generator["fc.weight"].shape
    except KeyError as error:
        raise SourceError(f"the generator has no {error.args[0]}; is it really of --arch {arch}?") from error
    side = round((rows / (_WIDTH_UNITS * nf)) ** 0.5)
    if side * side * _WIDTH_UNITS * nf != rows:
        raise SourceError(f"fc.weight has {rows} rows, which is not {_WIDTH_UNITS * nf} times a square: not resnet4")
    classes = generator["class_bias.weight"].shape[1] if "class_bias.weight" in generator else 0
    # The class-conditional release replaces a scalar embedding by a constant.
    nlabels, embed = (1, 1) if classes else generator.get("embedding.weight", torch.empty(1, 0)).shape
    size = SIDE_FACTORS["resnet4"] * side
    source = ModelConfig("resnet4", size, channels, nf, z_dim=columns - embed, embed=embed, nlabels=nlabels)
    return MemoryConfig(source, classes, PUBLISHED_EMBEDDING if classes else None, normalise_d=bool(classes))


def _rename(network: str, state: State) -> State:
    """A released state under our names; the class-conditional generator's embedding, which it never reads, is left."""
    renamed = state_from_reference(state)
    return {name: v for name, v in renamed.items() if name != "embedding.weight" or "class_bias.weight" not in renamed}


ARCHITECTURE = Architecture(
    names=("memory",),
    describe=MemoryConfig.from_json,
    generator=MemoryGenerator,
    discriminator=MemoryDiscriminator,
    groups=memory_groups,
    modulated=modulated_convolutions,
    infer=_infer,
    rename=_rename,
)


def _modulate_blocks(network: nn.Module, components: Mapping[str, tuple[int, int]]) -> None:
    blocks = [(name, module) for name, module in network.named_modules() if isinstance(module, ResBlock)]
    left = set(components)
    for name, block in blocks:
        for leaf in ("conv_0", "conv_1"):
            full, plain = f"{name}.{leaf}", getattr(block, leaf)
            left.discard(full)
            pair = components.get(full)
            setattr(block, leaf, ShiftedConv2d.from_module(plain) if pair is None else LowRankConv2d(plain, *pair))
    if left:
        raise ValueError(f"components of {', '.join(sorted(left))}: the generator has no such convolution")


def _train_modulation(network: nn.Module) -> None:
    trained = set(modulation_parameters(network))
    for name, parameter in network.named_parameters():
        stored = name.rpartition(".")[2] in LowRankConv2d.stored
        parameter.requires_grad_(name in trained and not stored)


@torch.no_grad()
def _normalise(layer: ShiftedConv2d | RowLinear | LowRankConv2d) -> None:
    """Take mean and deviation out of the layer's weight and put them into its modulation; computed in float64."""
    rows = isinstance(layer, RowLinear)
    weight, dims = layer.weight.double(), (1,) if rows else (2, 3)
    over = "channel" if rows else "filter"
    deviation, mean = torch.std_mean(weight, dims, correction=1, keepdim=True)
    layer.weight.copy_(modulate_normalized(weight, None, None, over=over, eps=LEAST_DEVIATION))
    layer.reset_modulation()
    layer.gamma.copy_(deviation.clamp_min(LEAST_DEVIATION))
    layer.beta.copy_(mean)
