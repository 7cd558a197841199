"""What a run would be, without running it: its networks, its memory by part, and the time of one step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..methods import method_by_name
from ..methods.config import TrainConfig
from ..metrics.extractors import get_extractor
from ..models.architecture import Description
from ..models.transfer import block_table, format_block_table
from .assemble import Assembly, assemble
from .graphs import GraphedStep
from .inputs import Inputs, Latents, Reals
from .loop import Trainer
from .memory import LiveMeter, PeakMeter, SavedMeter, held_bytes
from .parallel import Parallel
from .precision import resolve_autocast, resolve_device
from .progress import Console
from .run_data import load_data
from .rundir import RunDirectory
from .start import resolve_run

GENERATOR, FAKES, PLAIN, PENALISED = "G step", "images for D", "D step", "D step with penalty"


@dataclass(frozen=True)
class DryRun:
    """Bytes and times of a run's steps.

    ``held`` stays from step to step, by part; by phase, ``saved`` is the most that autograd keeps for the backward
    pass, ``passing`` what lives beside it at the phase's peak (gradients of maps, casts), ``seconds`` the time.
    ``predicted`` is what is held and what the largest phase adds; ``measured`` the peak over all steps, by
    ``measured_by``. ``images_per_second`` counts a whole iteration: every discriminator step with the images made for
    it, the penalty as often as the run takes it.
    """

    held: dict[str, int]
    saved: dict[str, int]
    passing: dict[str, int]
    seconds: dict[str, float]
    measured: int
    measured_by: str
    images_per_second: float

    @property
    def predicted(self) -> int:
        return sum(self.held.values()) + self.saved[self.largest] + self.passing[self.largest]

    @property
    def largest(self) -> str:
        """The phase that takes most memory."""
        return max(self.saved, key=lambda phase: self.saved[phase] + self.passing[phase])


@dataclass(frozen=True)
class Batch:
    """Inputs of the first generator step and discriminator step of a run."""

    latents: Latents
    reals: Reals
    mix: Tensor | None
    draws: tuple[Tensor | None, Tensor | None, Tensor | None]


def first_batch(inputs: Inputs) -> Batch:
    """What the networks see in step 0."""
    draws = tuple(inputs.draws(0, which) for which in ("generator", "real0", "fake0"))
    return Batch(inputs.latents(0), inputs.reals(0), inputs.mix(0), draws)


def dry_run(method_name: str, config: TrainConfig, model: Description | None = None) -> DryRun:
    """Build everything as ``start_run`` does, take three steps of each kind, print what they cost; no file is written.

    The prediction counts every tensor of a step, and not what a convolution uses while it runs.

    Raises:
        AdafmError: as ``start_run``; UsageError also where a step does not fit into the device's memory.
    """
    console = Console()
    method = method_by_name(method_name)
    config, described, sources = resolve_run(method, config, model)
    run = RunDirectory(config.outdir)
    run.refuse_existing()
    parallel = Parallel(resolve_device(config.device))
    data = load_data(config, described, console, parallel)
    if config.eval_every >= 0:
        console.line(f"evaluation by {get_extractor(config.extractor).name}")
    device = parallel.device
    peak = PeakMeter(device)
    torch.manual_seed(config.seed)
    networks = method.structure(described, config)
    method.initialise(networks, sources, config, console.line, resolve_autocast(config.precision, device))
    assembly = assemble(method, networks, config, parallel, method.copied(networks, sources, config))
    if isinstance(assembly.step, GraphedStep):
        assembly.step = assembly.step.eager
        console.line("the times below are those of steps outside of CUDA graphs")
    console.line(format_block_table(block_table(networks.generator, networks.discriminator, networks.model)))
    trainer = Trainer(assembly, config, data.training, None, run, console, labels=data.labels)
    # What a method releases in mid-run is trained in the last step, if in any.
    method.before_step(networks, config, config.steps - 1)
    batch = first_batch(trainer.inputs)
    try:
        result = measure(assembly, config, batch, peak)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"a step of {config.batch} images does not fit into the memory of {device}: lower --batch, or take "
            f"--checkpoint-activations ({str(error).splitlines()[0]})"
        ) from error
    console.line(report(result, assembly, config))
    return result


def measure(assembly: Assembly, config: TrainConfig, batch: Batch, peak: PeakMeter) -> DryRun:
    """Three steps of each kind on ``batch``: a first one that makes the optimizers' state, one with meters on what
    autograd keeps and what else lives, one against the clock."""
    step = assembly.step
    interval = step.config.reg_interval
    # With the generator first, the first discriminator step takes the images that its step has made.
    made_apart = config.critic_steps - (config.order == "generator-first")
    phases = [GENERATOR, *([FAKES] if made_apart else []), PENALISED, *([PLAIN] if interval > 1 else [])]
    known = [
        *assembly.networks.generator.parameters(),
        *assembly.networks.discriminator.parameters(),
        batch.reals.images,
    ]
    for player in (step.G, step.D):
        known += [] if player.plan is None else player.plan.weights.values()
    peak.start()
    images = torch.zeros_like(batch.reals.images)
    for phase in phases:
        images = _run(assembly, phase, batch, images)
    saved, passing, seconds = {}, {}, {}
    for phase in phases:
        player = step.G if phase in (GENERATOR, FAKES) else step.D
        with LiveMeter() as live, SavedMeter(known) as kept:
            images = _run(assembly, phase, batch, images)
        gradients = live.bytes_of(p.grad for p in player.network.parameters() if p.grad is not None)
        saved[phase], passing[phase] = kept.peak, max(0, live.peak - kept.peak - gradients)
    for phase in phases:
        _wait(assembly.device)
        start = time.perf_counter()
        images = _run(assembly, phase, batch, images)
        _wait(assembly.device)
        seconds[phase] = time.perf_counter() - start
    penalised = seconds[PENALISED]
    critic = (penalised + (interval - 1) * seconds.get(PLAIN, 0.0)) / interval
    iteration = seconds[GENERATOR] + made_apart * seconds.get(FAKES, 0.0) + config.critic_steps * critic
    rate = config.critic_steps * len(batch.reals.images) / iteration
    held = held_bytes(assembly)
    held["inputs and images"] = batch.reals.images.nbytes + batch.latents.nbytes + images.nbytes
    return DryRun(held, saved, passing, seconds, peak.peak(), peak.what, rate)


def report(result: DryRun, assembly: Assembly, config: TrainConfig) -> str:
    """The result as the lines that the command prints."""
    compute = "float32" if assembly.autocast is None else str(assembly.autocast).removeprefix("torch.")
    largest = result.largest
    rows = [
        *result.held.items(),
        (f"saved for backward ({largest})", result.saved[largest]),
        (f"passing ({largest})", result.passing[largest]),
        ("predicted peak", result.predicted),
        ("measured peak", result.measured),
    ]
    lines = [f"device {assembly.device}, compute type {compute}, {torch.get_num_threads()} threads", *assembly.remarks]
    lines.append("memory")
    lines += [f"  {name:36} {_mebibytes(size):>10} MiB" for name, size in rows]
    lines.append(f"  measured by {result.measured_by}, which also has what convolutions use and the allocator keeps")
    lines.append(f"one step of {config.batch} images")
    for phase, seconds in result.seconds.items():
        lines.append(
            f"  {phase:36} {1000 * seconds:>10.1f} ms, saves {_mebibytes(result.saved[phase])} MiB for backward"
        )
    lines.append(f"  {result.images_per_second:.1f} images/s with the penalty every {config.r1_interval} steps")
    lines.append("dry run: nothing was written")
    return "\n".join(lines)


def _run(assembly: Assembly, phase: str, batch: Batch, images: Tensor) -> Tensor:
    """One step of one kind; returns the generator's newest images."""
    latents = batch.latents
    if phase == GENERATOR:
        images = assembly.step.generator(latents.z, latents.y, latents.noise, batch.draws[0]).images
        assembly.average.update()
        return images
    if phase == FAKES:
        return assembly.step.fakes(latents.z, latents.y, latents.noise)
    # The penalty is taken where the count of discriminator steps is a multiple of its interval.
    assembly.step.d_steps = 0 if phase == PENALISED else 1
    draws = None if assembly.augment is None else batch.draws[1:]
    assembly.step.discriminator(batch.reals.images, images, batch.reals.y, latents.y, batch.mix, draws)
    return images


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
