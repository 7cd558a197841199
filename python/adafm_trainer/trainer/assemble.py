"""Networks, optimizers, average and step of a run, built from its settings alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adafm_kernels import FusedAdam, ModulationPlan
from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear

from ..errors import SourceError
from ..methods.augment import Augment, make_augment
from ..methods.average import Average
from ..methods.base import Group, Networks, TransferMethod
from ..methods.config import TrainConfig
from ..methods.gan_step import GanStep
from ..methods.player import Player
from ..methods.regularise import Anchor, fisher_information
from ..methods.regularise import Latents as FisherSamples
from ..methods.step_config import StepConfig
from ..methods.tf_adam import tf_epsilon
from ..models.catalogue import published_loss
from .double_backward import choose_double_backward
from .graphs import CudaRuntime, GraphedStep, make_capturable, resolve_graphs, set_learning_rate
from .parallel import Parallel
from .precision import resolve_autocast, resolve_device, resolve_layout
from .sampling import draw_labels, draw_latents, draw_noise

# Source samples that the Fisher information of --reg ewc is taken over.
FISHER_SAMPLES = 256


@dataclass
class Assembly:
    """Everything of a run that holds tensors."""

    config: TrainConfig
    method: TransferMethod
    networks: Networks
    groups: list[Group]
    average: Average
    step: GanStep | GraphedStep
    device: torch.device
    autocast: torch.dtype | None
    layout: torch.memory_format
    parallel: Parallel
    double_backward: str
    labelled: int
    """Classes of the labels that the generator is given; 0 where it is given none."""
    augment: Augment | None
    remarks: tuple[str, ...]
    """What was chosen by measurement or by the device, as lines for the log."""

    def model_state(self) -> dict[str, Tensor]:
        state = {f"generator.{k}": v for k, v in self.networks.generator.state_dict().items()}
        state.update({f"discriminator.{k}": v for k, v in self.networks.discriminator.state_dict().items()})
        return state

    def load(self, model: dict[str, Tensor], average: dict[str, Tensor], trainer: dict) -> None:
        """Put a checkpoint's tensors and counters in place; any missing or unexpected tensor is an error."""
        for prefix, network in (
            ("generator.", self.networks.generator),
            ("discriminator.", self.networks.discriminator),
        ):
            part = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
            _load_exactly(network, part, prefix)
        _load_exactly(self.average.module, average, "average.")
        self.average.load_state_dict(trainer["average"])
        self.step.G.optimizer.load_state_dict(trainer["opt_g"])
        self.step.D.optimizer.load_state_dict(trainer["opt_d"])
        self.step.load_state_dict(trainer["gan_step"])
        if self.augment is not None:
            self.augment.load_state_dict(trainer["augment"])
        if "anchor" in trainer:
            saved = trainer["anchor"]
            anchor = Anchor(self.networks.generator, saved["start"], self.config.reg_weight, saved["fisher"])
            anchor.load_state_dict(saved)
            self.step.G.anchor = anchor
        for player in (self.step.G, self.step.D):
            make_capturable(player.optimizer, self.device, isinstance(self.step, GraphedStep))

    def trainer_state(self) -> dict:
        state = {
            "average": self.average.state_dict(),
            "opt_g": self.step.G.optimizer.state_dict(),
            "opt_d": self.step.D.optimizer.state_dict(),
            "gan_step": self.step.state_dict(),
        }
        for part, key in ((self.augment, "augment"), (self.step.G.anchor, "anchor")):
            if part is not None:
                state[key] = part.state_dict()
        return state

    def set_learning_rates(self, config: TrainConfig, step: int) -> None:
        """Linear warm-up over ``config.warmup`` steps, constant afterwards."""
        factor = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        for player in (self.step.G, self.step.D):
            for group in player.optimizer.param_groups:
                set_learning_rate(group, group["base_lr"] * factor)

    def set_epsilon(self, player: Player, count: int) -> None:
        """Before step number ``count`` (from 1) of a network: Adam's epsilon where TensorFlow has it, if asked."""
        if self.config.adam_epsilon == "tensorflow":
            for group in player.optimizer.param_groups:
                tf_epsilon(group, count)


def assemble(
    method: TransferMethod,
    networks: Networks,
    config: TrainConfig,
    parallel: Parallel | None = None,
    copied: Sequence[str] | None = None,
) -> Assembly:
    """Move the networks to the device of ``parallel`` (None: a single process) and build what trains them.

    To be called after the networks have their start values: the average starts as a copy of the generator, and
    ``--reg`` holds its parameters ``copied`` near the values they have now (None: a checkpoint brings both).

    Raises:
        UsageError: a setting that the device or the networks cannot have; ``--reg`` where nothing is ``copied``.
        SourceError: nothing is left to train.
    """
    parallel = Parallel(resolve_device(config.device)) if parallel is None else parallel
    device = parallel.device
    autocast = resolve_autocast(config.precision, device)
    modulated = [network for network in (networks.generator, networks.discriminator) if _is_modulated(network)]
    planned = bool(modulated) and config.modulation == "plan"
    layout = resolve_layout(config.layout, autocast, planned)
    for network in (networks.generator, networks.discriminator):
        network.to(device=device, memory_format=layout)
        network.checkpoint_activations = config.checkpoint_activations
    anchor = _anchor(networks, config, copied, parallel) if copied is not None and config.reg != "none" else None
    model = networks.model
    labelled = model.classes if config.labels == "folders" else 0
    networks.generator.sample_classes = labelled
    groups_g = method.generator_groups(networks, config)
    groups_d = method.discriminator_groups(networks, config)
    opt_g = _adam(networks.generator, groups_g, config)
    opt_d = _adam(networks.discriminator, groups_d, config)
    average = Average(
        networks.generator, [name for group in groups_g for name in group.parameters], config.ema, config.ema_ramp
    )
    half = autocast == torch.float16
    reg_autocast = None if half or config.r1_precision == "fp32" else autocast
    step_config = StepConfig(
        loss=published_loss(model) if config.loss == "auto" else config.loss,
        reg_type=config.reg_type,
        reg_param=config.r1_gamma / 2,
        reg_interval=config.r1_interval,
        gp_weight=config.gp_weight,
        class_weight=config.class_weight,
        saturation_weight=config.saturation,
        autocast=autocast,
        reg_autocast=reg_autocast,
        micro_batch=parallel.micro_batch(config.batch, config.batch_gpu),
    )
    chosen, remark = parallel.broadcast_object(_double_backward(config, networks, device, layout, step_config))
    step_config = dataclasses.replace(step_config, explicit=chosen == "explicit")
    players = []
    for network, optimizer in ((networks.generator, opt_g), (networks.discriminator, opt_d)):
        # The several backwards of D add up in float32; G has one, whose gradients stay in its type.
        several = network is networks.discriminator or step_config.micro_batch is not None
        wide = torch.float32 if several and autocast is not None else None
        plan = ModulationPlan(network, dtype=autocast, accumulate=wide) if planned and network in modulated else None
        players.append(
            Player(
                network,
                optimizer,
                None if plan is None else plan.attach(),
                torch.amp.GradScaler(device.type) if half else None,
                parallel.exchange if parallel.grouped else None,
            )
        )
    augment = None
    if config.aug not in ("none", "flip"):
        exchange = parallel.exchange if parallel.grouped else None
        augment = make_augment(config.aug, model.channels, model.size, device, exchange=exchange)
    players[0].anchor = anchor
    players[0].penalty = method.generator_penalty(networks, config)
    step: GanStep | GraphedStep = GanStep(*players, step_config, augment)
    graphed, graph_remark = resolve_graphs(
        config.graphs,
        device,
        scaled=half,
        grouped=parallel.grouped,
        choosing=hasattr(networks.generator, "choose"),
        moving_epsilon=config.adam_epsilon == "tensorflow",
    )
    for player in players:
        make_capturable(player.optimizer, device, graphed)
    if graphed:
        step = GraphedStep(step, CudaRuntime(device))
    groups, remarks = [*groups_g, *groups_d], (remark, graph_remark)
    return Assembly(
        config,
        method,
        networks,
        groups,
        average,
        step,
        device,
        autocast,
        layout,
        parallel,
        chosen,
        labelled,
        augment,
        remarks,
    )  # fmt: skip


def _anchor(networks: Networks, config: TrainConfig, names: Sequence[str], parallel: Parallel) -> Anchor:
    """What holds the parameters ``names`` near their values, with the source's Fisher information for ewc."""
    fisher = None
    if config.reg == "ewc":
        generator, classes = networks.generator, networks.model.classes if config.labels == "folders" else 0
        generator.sample_classes = classes
        indices = range(FISHER_SAMPLES)
        z, y = draw_latents(generator, config.seed, "fisher", 0, indices), draw_labels(generator, indices)
        noise = draw_noise(generator, config.seed, "fisher", 0, indices)
        device = parallel.device
        samples = FisherSamples(
            z.to(device),
            None if y is None else y.to(device),
            None if noise is None else tuple(n.to(device) for n in noise),
        )
        fisher = fisher_information(generator, networks.discriminator, [samples], names)
        parallel.broadcast(fisher.values())
    return Anchor(networks.generator, names, config.reg_weight, fisher)


def _double_backward(
    config: TrainConfig, networks: Networks, device: torch.device, layout: torch.memory_format, step: StepConfig
) -> tuple[str, str]:
    """Form of the penalty's second derivative and the reason, for images of the run's size."""
    model = networks.model
    count = step.micro_batch or config.batch
    images = torch.zeros(count, model.channels, model.size, model.size, device=device)
    images = images.contiguous(memory_format=layout)
    return choose_double_backward(config.conv_double_backward, networks.discriminator, images, step)


def _is_modulated(network: nn.Module) -> bool:
    return any(isinstance(m, (AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear)) for m in network.modules())


def _adam(module: nn.Module, groups: list[Group], config: TrainConfig) -> FusedAdam:
    named = dict(module.named_parameters())
    by_lr: dict[float, list[Tensor]] = {}
    for group in groups:
        if group.parameters:
            by_lr.setdefault(group.lr, []).extend(named[name] for name in group.parameters)
    listed = [{"params": params, "lr": lr, "base_lr": lr} for lr, params in by_lr.items()]
    if not listed:
        raise SourceError(
            f"nothing is left to train in the {type(module).__name__}: every group is frozen; "
            "lower --freeze-g or --freeze-d"
        )
    return FusedAdam(listed, lr=config.lr_g, betas=(float(config.beta1), float(config.beta2)), eps=config.adam_eps)


def _load_exactly(network: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    expected = network.state_dict()
    problems = [f"missing {prefix}{k}" for k in expected.keys() - state.keys()]
    problems += [f"unexpected {prefix}{k}" for k in state.keys() - expected.keys()]
    problems += [
        f"{prefix}{k} is {tuple(state[k].shape)}, the run's settings give {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if problems:
        raise SourceError(f"the checkpoint does not fit config.yaml: {'; '.join(sorted(problems)[:5])}")
    network.load_state_dict(state)
