"""Starting a run and continuing one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ..errors import UsageError
from ..locate import source_path
from ..methods import method_by_name
from ..methods.base import TransferMethod
from ..methods.config import TrainConfig
from ..methods.config_file import read_config, write_config
from ..models.architecture import Description
from ..models.catalogue import architecture, describe, published_loss
from ..models.source import SourcePair, load_pair, save_pair
from ..report.report import write_report
from .assemble import assemble
from .checkpoint import load_checkpoint
from .evaluation import Evaluator, make_evaluator
from .loop import Trainer
from .opening import write_description
from .parallel import Parallel
from .precision import resolve_autocast
from .progress import Console, SilentConsole
from .run_data import Data, check_data, load_data
from .rundir import RunDirectory


def start_run(method_name: str, config: TrainConfig, model: Description | None = None) -> Path:
    """Train a new run from start to end and write its report; returns the run directory.

    ``model`` describes the networks when there is no source to take the description from. Under `torchrun` this is
    called in every process; rank 0 alone writes.

    Raises:
        AdafmError: see the exit code of each subclass; everything written so far stays.
    """
    method = method_by_name(method_name)
    parallel = Parallel.from_environment(config.device, config.dist_timeout)
    parallel.micro_batch(config.batch, config.batch_gpu)
    with parallel:
        config, described, sources = resolve_run(method, config, model)
        run = RunDirectory(config.outdir)
        with _occupied(run, parallel, run.create) as console:
            data = load_data(config, described, console, parallel)
            _agree_on_settings(parallel, method_name, config, described, data)
            torch.manual_seed(config.seed)
            networks = method.structure(described, config)
            autocast = resolve_autocast(config.precision, parallel.device)
            initialise = partial(method.initialise, networks, sources, config, console.line, autocast)
            parallel.on_main("the start values", initialise)
            for network in (networks.generator, networks.discriminator):
                parallel.broadcast([*network.parameters(), *network.buffers()])
            assembly = assemble(method, networks, config, parallel, method.copied(networks, sources, config))

            def open_run() -> Evaluator | None:
                settled = dataclasses.replace(config, conv_double_backward=assembly.double_backward)
                write_config(run.config, method_name, settled, described.to_json())
                write_description(run, console, assembly, config, data, sources)
                return make_evaluator(config, data, console)

            evaluator = parallel.on_main("the description of the run", open_run)
            trainer = Trainer(assembly, config, data.training, evaluator, run, console, labels=data.labels)
            return _train(trainer, run, lambda: sources)


def resume_run(folder: str | Path, *, steps: int | None = None, allow_data_change: bool = False) -> Path:
    """Continue a run from its newest whole checkpoint, bit for bit on the same machine, thread and process count.

    ``steps`` may lengthen (or shorten) the run; nothing else can change. Under `torchrun` rank 0 reads the checkpoint
    and every process starts from what it read.
    """
    run = RunDirectory(folder)
    run.open_existing()
    method_name, config, model = read_config(run.config)
    config = dataclasses.replace(config, outdir=str(folder), steps=config.steps if steps is None else steps)
    described = describe(model)
    parallel = Parallel.from_environment(config.device, config.dist_timeout)
    parallel.micro_batch(config.batch, config.batch_gpu)
    with parallel:
        with _occupied(run, parallel) as console:
            found = parallel.on_main("the checkpoint", partial(load_checkpoint, run.checkpoints, console.line))
            path, model_state, average, trainer = parallel.broadcast_object(found)
            loop = trainer["loop"]
            if config.steps < loop["step"]:
                raise UsageError(f"--steps {config.steps} lies before the checkpoint's step {loop['step']}")
            data = load_data(config, described, console, parallel)
            parallel.on_main("the check of the images", partial(check_data, run, data, allow_data_change))
            _agree_on_settings(parallel, method_name, config, described, data)
            method = method_by_name(method_name)
            networks = method.structure(described, config)
            method.before_step(networks, config, loop["step"])
            assembly = assemble(method, networks, config, parallel)
            assembly.load(model_state, average, trainer)

            def open_run() -> Evaluator | None:
                write_config(run.config, method_name, config, model)
                run.truncate_rows(loop["step"])
                console.line(f"resuming {folder} at step {loop['step']} from {path.name}")
                if (before := loop.get("processes", 1)) != parallel.world:
                    console.line(
                        f"{before} processes before, {parallel.world} now: the same training, but sums are rounded in "
                        "another order, so it does not continue bit for bit"
                    )
                return make_evaluator(config, data, console)

            evaluator = parallel.on_main("the description of the run", open_run)
            trainer = Trainer(assembly, config, data.training, evaluator, run, console, loop, data.labels)
            return _train(trainer, run, partial(_load_sources, config, method, described))


def resolve_run(
    method: TransferMethod, config: TrainConfig, model: Description | None
) -> tuple[TrainConfig, Description, tuple[SourcePair, ...]]:
    """Settings without anything left to inherit, the description of the run's networks, and the sources."""
    sources = _load_sources(config, method, model)
    described = method.target_model(sources, config) if sources else model
    scales = {float(source.meta.get("data_scale", 1.0)) for source in sources}
    if config.data_scale is None and len(scales) > 1:
        raise UsageError(
            f"the sources were trained on images scaled to {', '.join(map(str, sorted(scales)))}; give --data-scale"
        )
    if config.data_scale is None:
        inherited = float(sources[0].meta.get("data_scale", 1.0)) if sources else 1.0
        config = dataclasses.replace(config, data_scale=inherited)
    if config.loss == "auto":
        config = dataclasses.replace(config, loss=published_loss(described))
    if described.classes and config.labels == "none" and not architecture(described.arch).label_free:
        raise UsageError(
            f"the networks are conditioned on {described.classes} classes: add --labels folders, with one folder of "
            "--data for each"
        )
    if config.labels == "folders" and not described.classes:
        raise UsageError(
            f"--labels folders: `adafm train {method.name}` makes no network here that is conditioned on labels; leave "
            "it out" + ("" if method.name == "minegan" else ", or give --classes with the number of the target's")
        )
    if config.aug == "ada" and config.loss == "wgan-gp":
        raise UsageError(
            "--aug ada reads the sign of the discriminator's logits, which means nothing with --loss wgan-gp; use "
            "--aug diffaug"
        )
    if config.reg == "ewc" and any(source.discriminator_state is None for source in sources):
        raise UsageError(
            "--reg ewc measures Fisher information with the source's discriminator, and the source has none; use "
            "--reg l2sp"
        )
    return config, described, sources


def save_source(trainer: Trainer, run: RunDirectory) -> Path:
    """Write the trained pair as a folder that --source takes: float16 weights and how they came about."""
    environment = json.loads((run.root / "environment.json").read_text(encoding="utf-8"))
    manifest = json.loads((run.root / "data_manifest.json").read_text(encoding="utf-8"))["training"]
    config, networks = trainer.config, trainer.assembly.networks
    meta = {
        "command": environment["command"],
        "data": {"images": manifest["count"], "sha256": manifest["sha256"]},
        "data_scale": config.data_scale,
        "seed": config.seed,
        "steps": trainer.step,
        "batch": config.batch,
        "seconds": round(trainer.clock.wall(), 1),
        "device": environment["cpu"] if trainer.assembly.device.type == "cpu" else environment["device"],
        "torch": environment["torch"],
    }
    return save_pair(
        run.root / "source",
        networks.model,
        networks.generator,
        networks.discriminator,
        trainer.assembly.average.module,
        meta,
        torch.float16,
    )


@contextmanager
def _occupied(run: RunDirectory, parallel: Parallel, prepare: Callable[[], None] | None = None) -> Iterator[Console]:
    """The run directory, locked by rank 0 on behalf of all; gives the console of this process."""

    def occupy() -> None:
        if prepare is not None:
            prepare()
        run.lock()

    parallel.on_main("the run directory", occupy)
    try:
        yield Console(run.root / "log.txt") if parallel.main else SilentConsole()
    finally:
        if parallel.main:
            run.unlock()


def _agree_on_settings(parallel: Parallel, method: str, config: TrainConfig, model: Description, data: Data) -> None:
    """Every process must have been started alike; only paths may differ from machine to machine."""
    paths = ("data", "eval_data", "source", "outdir")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in paths}
    state = [method, settings, model.to_json(), data.training.manifest["sha256"]]
    parallel.agree(state, "the settings and training images", UsageError)


def _load_sources(config: TrainConfig, method: TransferMethod, model: Description | None) -> tuple[SourcePair, ...]:
    if len(config.source) > method.most_sources:
        raise UsageError(
            f"{len(config.source)} sources were given, and `adafm train {method.name}` takes {method.most_sources}"
        )
    if config.source:
        return tuple(load_pair(source_path(source)) for source in config.source)
    if method.needs_source:
        raise UsageError(f"`adafm train {method.name}` starts from a source: add --source FOLDER or --source bundled")
    if model is None:
        raise UsageError(
            "the networks' sizes are not known: give --source (for its sizes only) or use `adafm pretrain`"
        )
    return ()


def _train(trainer: Trainer, run: RunDirectory, sources: Callable[[], Sequence[SourcePair]]) -> Path:
    assembly, parallel = trainer.assembly, trainer.assembly.parallel
    try:
        trainer.run()
        finish = partial(assembly.method.finish, assembly.average.module, trainer.config, sources, trainer.console.line)
        parallel.on_main("what the method does at the end", finish)
        if not assembly.method.needs_source:
            folder = parallel.on_main("the source networks", partial(save_source, trainer, run))
            trainer.console.line(f"source networks for --source: {folder}")
    finally:
        if parallel.main and run.stats.is_file():
            report = write_report(run.root)
            trainer.console.line(f"report: {report}")
    return run.root
