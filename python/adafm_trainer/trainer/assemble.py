"""Networks, optimizers, average and step of a run, built from its settings alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adafm_kernels import ModulationPlan
from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear

from ..errors import SourceError
from ..methods import method_by_name
from ..methods.average import Average
from ..methods.base import Group, Networks, TransferMethod
from ..methods.config import TrainConfig
from ..methods.gan_step import GanStep, StepConfig
from ..methods.player import Player
from ..models.config import ModelConfig
from .double_backward import choose_double_backward
from .graphs import CudaRuntime, GraphedStep, make_capturable, resolve_graphs, set_learning_rate
from .parallel import Parallel
from .precision import resolve_autocast, resolve_device, resolve_layout


@dataclass
class Assembly:
    """Everything of a run that holds tensors."""

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
        for player in (self.step.G, self.step.D):
            make_capturable(player.optimizer, self.device, isinstance(self.step, GraphedStep))

    def trainer_state(self) -> dict:
        return {
            "average": self.average.state_dict(),
            "opt_g": self.step.G.optimizer.state_dict(),
            "opt_d": self.step.D.optimizer.state_dict(),
            "gan_step": self.step.state_dict(),
        }

    def set_learning_rates(self, config: TrainConfig, step: int) -> None:
        """Linear warm-up over ``config.warmup`` steps, constant afterwards."""
        factor = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        for player in (self.step.G, self.step.D):
            for group in player.optimizer.param_groups:
                set_learning_rate(group, group["base_lr"] * factor)


def build_networks(method_name: str, config: TrainConfig, model: ModelConfig) -> tuple[TransferMethod, Networks]:
    """Method and networks of a run with arbitrary values, on the CPU."""
    method = method_by_name(method_name)
    return method, method.structure(model, config)


def assemble(
    method: TransferMethod, networks: Networks, config: TrainConfig, parallel: Parallel | None = None
) -> Assembly:
    """Move the networks to the device of ``parallel`` (None: a single process) and build what trains them.

    To be called after the networks have their start values: the average starts as a copy of the generator.
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
        loss=config.loss,
        reg_type=config.reg_type,
        reg_param=config.r1_gamma / 2,
        reg_interval=config.r1_interval,
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
    step: GanStep | GraphedStep = GanStep(*players, step_config)
    graphed, graph_remark = resolve_graphs(config.graphs, device, scaled=half, grouped=parallel.grouped)
    for player in players:
        make_capturable(player.optimizer, device, graphed)
    if graphed:
        step = GraphedStep(step, CudaRuntime(device))
    groups, remarks = [*groups_g, *groups_d], (remark, graph_remark)
    return Assembly(method, networks, groups, average, step, device, autocast, layout, parallel, chosen, remarks)


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


def _adam(module: nn.Module, groups: list[Group], config: TrainConfig) -> torch.optim.Adam:
    named = dict(module.named_parameters())
    # Groups of one step size share a call.
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
    return torch.optim.Adam(
        listed, lr=config.lr_g, betas=(float(config.beta1), float(config.beta2)), eps=1e-8, fused=True
    )


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
