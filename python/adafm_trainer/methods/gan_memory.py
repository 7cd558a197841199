"""GAN memory: a task is a modulation of a frozen source, kept in a bank (Cong et al., NeurIPS 2020)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import SourceError, UsageError
from ..models.config import GPGAN_FAMILIES
from ..models.memory import MemoryDiscriminator, MemoryGenerator, load_source, modulated_layers
from ..models.memory_bank import MemoryBank
from ..models.memory_config import PUBLISHED_EMBEDDING, MemoryConfig
from ..models.memory_file import FILE, describe_bank
from ..models.memory_lowrank import rank_penalty
from ..models.source import SourcePair
from .base import Group, Networks, TransferMethod, freeze_groups, trained
from .config import TrainConfig
from .transfergan import source_generator_state

# What a task may be called: it is a folder's name and an item of lists on the command line.
_TASK_NAME = re.compile(r"\w[\w.+@ -]*(?<! )")
# Generator steps between two rank penalties, and the weight of each (released code).
PENALTY_INTERVAL, PENALTY_WEIGHT = 10, 0.01


class GanMemory(TransferMethod):
    """The source's filters stay frozen and normalised; gamma, beta and bias shifts of G and D, and D's ``fc``, train.

    A run is one task. It starts from the source's own statistics, whatever was learned before; with ``storage``
    low-rank the wide layers start from the components in ``bank``. At the end its average goes into ``bank``.
    With ``faithful`` the class-conditional form is the published one: a constant instead of the source's embedding, and
    the classes' biases random, so that it does not start at the source's function.
    """

    name = "gan-memory"

    def target_model(self, sources: Sequence[SourcePair], config: TrainConfig) -> MemoryConfig:
        source = sources[0].cfg
        if config.storage == "low-rank" and config.graphs != "off":
            raise UsageError(
                f"--graphs {config.graphs}: the rank penalty of --storage low-rank decomposes matrices in some steps "
                "only, which no graph captures; use --graphs off"
            )
        if source.arch not in GPGAN_FAMILIES:
            raise SourceError(
                f"the source is of arch {source.arch!r}; `adafm train {self.name}` takes one of "
                f"{', '.join(GPGAN_FAMILIES)}"
            )
        published = bool(config.faithful and config.classes)
        model = MemoryConfig(
            source,
            classes=config.classes,
            embedding=PUBLISHED_EMBEDDING if published and source.embed else None,
            class_init="uniform" if published else "zero",
            normalise_d=config.normalise_d == "on" or (config.normalise_d == "auto" and config.classes > 0),
        )
        name = None if config.bank is None else task_name(config)
        if not _is_bank(config.bank):
            return model
        described = describe_bank(config.bank)
        if name in (task["name"] for task in described["tasks"]):
            raise UsageError(
                f"task {name!r} is in the bank {config.bank} already, and a bank's tasks never change; name this one "
                "otherwise with --task"
            )
        if described["storage"] != config.storage:
            kept = described["storage"]
            raise UsageError(f"the bank in {config.bank} has {kept} storage; add --storage {kept}")
        following = MemoryConfig.from_json(described["next_model"])
        if dataclasses.replace(following, components={}) != model:
            raise SourceError(
                f"the tasks of the bank in {config.bank} are not of this source's family and sizes, or of other "
                "--classes, --normalise-d or --faithful; a bank's tasks agree in all of them"
            )
        return following

    def structure(self, model: MemoryConfig, config: TrainConfig) -> Networks:
        networks = Networks(MemoryGenerator(model), MemoryDiscriminator(model), model)
        freeze_groups(networks, model, config)
        return networks

    def initialise(
        self,
        networks: Networks,
        sources: Sequence[SourcePair],
        config: TrainConfig,
        log: Callable[[str], None],
        autocast: torch.dtype | None = None,
    ) -> None:
        (source,) = sources
        if source.discriminator_state is None:
            raise SourceError(
                "the source has no discriminator, and GAN memory modulates the source's own; give a --source with one"
            )
        state = source_generator_state(source, config, log)
        if _is_bank(config.bank):
            # It refuses another source now, not when the task is done.
            bank = MemoryBank.load(config.bank, state)
            bank.start(networks.generator)
            log(f"bank {config.bank}: {len(bank)} tasks ({', '.join(bank.names)}), {bank.storage} storage")
        else:
            load_source(networks.generator, state)
        layers = len(networks.model.components)
        low_rank = f", {layers} layers at what the bank holds" if layers else ""
        log(f"generator: source normalised; gamma and beta start at its filters' deviation and mean{low_rank}")
        left = load_source(networks.discriminator, source.discriminator_state)
        log(
            f"discriminator: source {'normalised' if networks.model.normalise_d else 'as it is'}"
            + ("; fc starts at random" if "fc.weight" in left else "")
        )

    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        names = trained(networks.generator)
        leaves = {name: name.rpartition(".")[2] for name in names}
        gamma = tuple(name for name in names if leaves[name] in ("gamma", "gamma_s"))
        beta = tuple(name for name in names if leaves[name] in ("beta", "beta_s", "shift"))
        classes = tuple(name for name in names if name.startswith("class_bias."))
        return [
            Group("gamma", gamma, config.lr_gamma),
            Group("beta", beta, config.lr_beta),
            Group("classes", classes, config.lr_head),
        ]

    def copied(self, networks: Networks, sources: Sequence[SourcePair], config: TrainConfig) -> list[str]:
        return trained(networks.generator)

    def before_step(self, networks: Networks, config: TrainConfig, step: int) -> str | None:
        networks.generator.rank_penalty_due = step % PENALTY_INTERVAL == 0
        return None

    def generator_penalty(self, networks: Networks, config: TrainConfig) -> Callable[[], None] | None:
        if config.storage == "full":
            return None
        convolutions = [layer for _, layer in modulated_layers(networks.generator) if layer.weight.dim() == 4]
        gammas = [layer.gamma for layer in convolutions if layer.gamma.requires_grad]
        betas = [layer.beta for layer in convolutions if layer.beta.requires_grad]

        def add() -> None:
            if networks.generator.rank_penalty_due:
                add_rank_penalty(gammas)
                add_rank_penalty(betas)

        return add

    def finish(
        self,
        average: nn.Module,
        config: TrainConfig,
        sources: Callable[[], Sequence[SourcePair]],
        log: Callable[[str], None],
    ) -> None:
        """Add the average's modulation to ``bank`` under ``task``; where it is there already, only say so.

        Raises:
            SourceError: the source is gone or is another one. UsageError: the bank has another task of that name.
        """
        if config.bank is None:
            return
        name = task_name(config)
        try:
            (source,) = sources()
        except SourceError as error:
            raise SourceError(
                f"task {name!r} is trained and kept in the run's checkpoint, but the bank {config.bank} takes it with "
                f"its source only: {error}; put the source back and --resume the run, which then adds the task"
            ) from error
        state = source_generator_state(source, config, log)
        if _is_bank(config.bank):
            bank = MemoryBank.load(config.bank, state)
            if name in bank:
                _check_same(bank, name, average, config)
                log(f"bank {config.bank}: task {name!r} is there already")
                return
        log(finish_task(config.bank, name, average, None, state, config.storage))


def task_name(config: TrainConfig) -> str:
    """What a run's task is called: ``task``, or else the name of ``data`` without folder and ending.

    Raises:
        UsageError: it does not begin with a letter or a digit, or has characters other than letters, digits and _.+@-
            or spaces inside.
    """
    path = Path(config.data).expanduser().resolve()
    name = (path.stem if path.is_file() else path.name) if config.task is None else config.task
    if not _TASK_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a task: begin with a letter or a digit, and use letters, digits, spaces and _.+@- "
            "only; a folder's own name is replaced with --task"
        )
    return name


def add_rank_penalty(parameters: Sequence[Tensor], weight: float = PENALTY_WEIGHT) -> None:
    """Add the gradient of ``rank_penalty`` to that of each parameter, ``[O, I]`` with any trailing ones."""
    if not parameters:
        return
    gradients = torch.autograd.grad(rank_penalty(parameters, weight), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def finish_task(
    folder: str | Path,
    name: str,
    generator: MemoryGenerator,
    discriminator: MemoryDiscriminator | None,
    source_state: Mapping[str, Tensor],
    storage: str = "full",
) -> str:
    """Add what a run has learned to the bank in ``folder``, which is made where there is none; a line for the log.

    Args:
        generator: the run's averaged generator (or its raw one), whose modulation becomes the task.
        discriminator: stored beside it, or None.
        source_state: the source generator's tensors that the run started from.

    Raises:
        SourceError: the bank or the generator belongs to another source.
        UsageError: the bank has another storage or another description, or holds a task of that name.
    """
    model = generator.memory
    if _is_bank(folder):
        bank = MemoryBank.load(folder, source_state)
        if bank.storage != storage:
            raise UsageError(f"the bank in {folder} has {bank.storage} storage, this run asks for {storage}")
    else:
        bank = MemoryBank(model, source_state, storage)
    try:
        bank.add(name, generator, discriminator)
    except ValueError as error:
        raise UsageError(f"the bank in {folder} cannot take task {name!r}: {error}") from error
    bank.save(folder)
    sizes = " and ".join(f"{size:,} bytes of the {network}" for network, size in bank.nbytes(name).items())
    line = f"bank {folder}: task {name!r} ({len(bank)} of them now) takes {sizes}"
    if kept := bank.components(name):
        numbers, published = bank.low_rank_numbers(name)
        line += (
            f"; {sum(map(sum, kept.values()))} new components in {len(kept)} layers are {numbers:,} numbers "
            f"({published:,} as the released code counts, which takes matrices for square)"
        )
    return line


def _check_same(bank: MemoryBank, name: str, average: MemoryGenerator, config: TrainConfig) -> None:
    """The task in the bank must be what the run has learned; what is stored in low rank is not compared."""
    state = average.state_dict()
    cut = {f"{layer}.{matrix}" for layer in bank.components(name) for matrix in ("gamma", "beta")}
    for key, value in bank.recall(name).items():
        if key not in cut and not torch.equal(state[key].cpu(), value):
            raise UsageError(
                f"the bank {config.bank} has a task {name!r} with another {key}: another run's, or this one's before "
                "it was made longer; a bank's tasks never change, so what was trained now stays in the run's "
                "checkpoint only. Train it under another --task"
            )


def _is_bank(folder: str | Path | None) -> bool:
    return folder is not None and (Path(folder) / FILE).is_file()
