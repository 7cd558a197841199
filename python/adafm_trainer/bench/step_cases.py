"""Network pairs that training steps are measured on, with weights and inputs that every configuration starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..locate import source_path
from ..methods.adafm import AdaFM
from ..methods.base import Networks, TransferMethod
from ..methods.config import TrainConfig
from ..methods.losses import gradient_penalty
from ..methods.presets import preset
from ..methods.scratch import Scratch
from ..models.catalogue import build_discriminator, build_generator, groups
from ..models.config import ModelConfig
from ..models.source import load_pair
from ..models.transfer import adapter_parameters, freeze, modulate_blocks
from ..trainer.demo import SOURCE, demo_config

# Share by which gamma and beta of random pairs leave identity, so that a wrong gradient of either is seen.
_MOVED = 0.1
# Mean penalty at the reals of a random pair.
_PENALTY = 0.1


@dataclass(frozen=True)
class StepCase:
    """One pair and its settings; ``model`` None: the demo's, with its bundled weights.

    ``fully``: every ``conv_0`` and ``conv_1`` of both networks is an AdaFM layer, gamma, beta and the discriminator's
    last layer are trained and everything else is frozen. Otherwise the pair is that of `adafm train adafm`.
    ``passes``: the pass over real images is timed by itself too.
    """

    name: str
    title: str
    batch: int
    model: ModelConfig | None
    fully: bool = False
    passes: bool = False

    @property
    def config(self) -> TrainConfig:
        """Settings of the run that the step belongs to; compute type and layout are the configuration's to set."""
        if self.model is None:
            return dataclasses.replace(demo_config("unused", steps=1, eval_samples=1), batch=self.batch)
        paper = {**preset("adafm", faithful=True), "adafm_start": 0, "batch": self.batch}
        return TrainConfig(data="unused", outdir="unused", **paper)

    @property
    def method(self) -> TransferMethod:
        """The method whose groups are trained: a fully modulated pair has one group for each network."""
        return Scratch() if self.fully else AdaFM()

    def networks(self) -> Networks:
        """The pair with arbitrary values, float32, on the CPU, ``requires_grad`` as in training."""
        if self.fully:
            return _fully_modulated(self.model)
        if self.model is not None:
            return self.method.structure(self.model, self.config)
        source = load_pair(source_path(SOURCE))
        return self.method.structure(self.method.target_model([source], self.config), self.config)


@dataclass(frozen=True)
class Start:
    """What every configuration of a case starts from: state dicts of the modulated pair, and the inputs."""

    generator: dict[str, Tensor]
    discriminator: dict[str, Tensor]
    z: Tensor
    noise: list[Tensor]
    real: Tensor

    def load(self, case: StepCase) -> Networks:
        """The case's pair with these values, in their type."""
        networks = case.networks()
        for network, state in ((networks.generator, self.generator), (networks.discriminator, self.discriminator)):
            network.to(self.z.dtype).load_state_dict(state)
        return networks


def cases(device: str, quick: bool) -> list[StepCase]:
    """The pairs of a run: on a GPU with the published width and larger batches; ``quick``: tiny, for tests."""
    if quick:
        head = {"z_dim": 8, "style_dim": 8, "keep": 3}
        return [
            StepCase(
                "adafm-128", "AdaFM pair, 32 px", 2,
                ModelConfig(arch="adafm", base="resnet2", size=32, nf=16, **head), passes=True,
            ),
            StepCase(
                "modulated-256", "fully modulated pair, 64 px", 2, ModelConfig("resnet4", 64, nf=16, z_dim=8), True
            ),
        ]  # fmt: skip
    gpu = device == "cuda"
    wide, narrow, demo = (16, 16, 64) if gpu else (4, 2, 16)
    return [
        StepCase(
            "adafm-128", "AdaFM pair, 128 px, paper settings", wide,
            ModelConfig(arch="adafm", base="resnet2", size=128), passes=True,
        ),
        StepCase(
            "modulated-256", "fully modulated pair, resnet4, 256 px", narrow,
            ModelConfig("resnet4", 256, nf=64 if gpu else 32), True,
        ),
        StepCase("modulated-128", "fully modulated pair, resnet2, 128 px", wide, ModelConfig("resnet2", 128), True),
        StepCase("demo", "the demo's pair", demo, None),
    ]  # fmt: skip


def make_start(case: StepCase, dtype: torch.dtype = torch.float32) -> Start:
    """Start values of a case, the same in every process: the demo's own, or random ones scaled as a trained pair's.

    Random ones: images of unit deviation before tanh, which is not saturated then, logits
    around 0 and a mean penalty of 0.1, so that losses and penalty both matter in the gradients.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = case.networks()
        generator, discriminator = networks.generator, networks.discriminator
        z = torch.randn(case.batch, generator.z_dim)
        noise = [torch.randn(case.batch, 1, *shape) for shape in generator.noise_shapes]
        side, channels = networks.model.size, networks.model.channels
        real = torch.rand(case.batch, channels, side, side) * 2 - 1
        if case.model is None:
            source = load_pair(source_path(SOURCE))
            case.method.initialise(networks, [source], case.config, lambda _: None, None)
        for network in (generator, discriminator):
            _leave_identity(network)
        if case.model is not None:
            _balance(generator, discriminator, z, noise, real)
    generator, discriminator = generator.to(dtype), discriminator.to(dtype)
    return Start(
        generator.state_dict(), discriminator.state_dict(), z.to(dtype), [n.to(dtype) for n in noise], real.to(dtype)
    )


@torch.no_grad()
def _leave_identity(network: nn.Module) -> None:
    for name in adapter_parameters(network):
        layer = network.get_submodule(name.rpartition(".")[0])
        scale = _MOVED if name.endswith("gamma") else _MOVED * float(layer.weight.std())
        parameter = network.get_parameter(name)
        parameter.add_(scale * torch.randn_like(parameter))


def _balance(generator: nn.Module, discriminator: nn.Module, z: Tensor, noise: list[Tensor], real: Tensor) -> None:
    with torch.no_grad():
        generator.conv_img.weight.div_(generator.pre_tanh(z, None, noise).std())
        generated = generator(z, None, noise)
    images = real.clone().requires_grad_()
    penalty = gradient_penalty(discriminator(images), images).mean().detach()
    with torch.no_grad():
        discriminator.fc.weight.mul_((_PENALTY / penalty).sqrt())
        logits = torch.cat([discriminator(real), discriminator(generated)])
        discriminator.fc.bias.sub_(logits.mean())


def _fully_modulated(model: ModelConfig) -> Networks:
    networks = Networks(build_generator(model), build_discriminator(model), model)
    for network, trained in ((networks.generator, 0), (networks.discriminator, 1)):
        count = len(groups(network, model))
        freeze(network, model, count - trained)
        modulate_blocks(network, model, count)
    return networks
