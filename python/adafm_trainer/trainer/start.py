"""Starting a run and continuing one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import keyed
from ..data.images import ImageSet, load_image_set
from ..errors import DataError, UsageError
from ..locate import image_path, source_path
from ..methods import method_by_name
from ..methods.base import Networks, TransferMethod
from ..methods.config import TrainConfig, read_config, write_config
from ..metrics.extractors import get_extractor
from ..models.config import ModelConfig
from ..models.source import SourcePair, load_pair, save_pair
from ..models.transfer import block_table, format_block_table
from ..report.report import write_report
from .assemble import Assembly, assemble
from .checkpoint import load_checkpoint, write_atomic
from .evaluation import Evaluator
from .loop import Trainer, write_blocks
from .parallel import Parallel
from .precision import resolve_autocast
from .progress import Console, SilentConsole
from .rundir import RunDirectory


@dataclass(frozen=True)
class Data:
    """The images of a run: those it trains on, those it is judged by, and the word for the latter."""

    training: ImageSet
    reals: ImageSet | None
    split: str


def start_run(method_name: str, config: TrainConfig, model: ModelConfig | None = None) -> Path:
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
        config, described, source = resolve_run(method, config, model)
        run = RunDirectory(config.outdir)
        with _occupied(run, parallel, run.create) as console:
            data = load_data(config, described, console, parallel)
            _agree_on_settings(parallel, method_name, config, described, data)
            torch.manual_seed(config.seed)
            networks = method.structure(described, config)
            autocast = resolve_autocast(config.precision, parallel.device)
            initialise = partial(method.initialise, networks, source, config, console.line, autocast)
            parallel.on_main("the start values", initialise)
            for network in (networks.generator, networks.discriminator):
                parallel.broadcast([*network.parameters(), *network.buffers()])
            assembly = assemble(method, networks, config, parallel)

            def describe() -> Evaluator | None:
                settled = dataclasses.replace(config, conv_double_backward=assembly.double_backward)
                write_config(run.config, method_name, settled, described.to_json())
                _describe(run, console, assembly, config, data, source)
                return _evaluator(config, data, console)

            evaluator = parallel.on_main("the description of the run", describe)
            return _train(Trainer(assembly, config, data.training, evaluator, run, console), run)


def resume_run(folder: str | Path, *, steps: int | None = None, allow_data_change: bool = False) -> Path:
    """Continue a run from its newest whole checkpoint, bit for bit on the same machine, thread and process count.

    ``steps`` may lengthen (or shorten) the run; nothing else can change. Under `torchrun` rank 0 reads the checkpoint
    and every process starts from what it read.
    """
    run = RunDirectory(folder)
    run.open_existing()
    method_name, config, model = read_config(run.config)
    config = dataclasses.replace(config, outdir=str(folder), steps=config.steps if steps is None else steps)
    described = ModelConfig.from_json(model)
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
            parallel.on_main("the check of the images", partial(_check_data, run, data, allow_data_change))
            _agree_on_settings(parallel, method_name, config, described, data)
            method = method_by_name(method_name)
            networks = method.structure(described, config)
            method.before_step(networks, config, loop["step"])
            assembly = assemble(method, networks, config, parallel)
            assembly.load(model_state, average, trainer)

            def describe() -> Evaluator | None:
                write_config(run.config, method_name, config, model)
                run.truncate_rows(loop["step"])
                console.line(f"resuming {folder} at step {loop['step']} from {path.name}")
                if (before := loop.get("processes", 1)) != parallel.world:
                    console.line(
                        f"{before} processes before, {parallel.world} now: the same training, but sums are rounded in "
                        "another order, so it does not continue bit for bit"
                    )
                return _evaluator(config, data, console)

            evaluator = parallel.on_main("the description of the run", describe)
            return _train(Trainer(assembly, config, data.training, evaluator, run, console, loop), run)


def resolve_run(
    method: TransferMethod, config: TrainConfig, model: ModelConfig | None
) -> tuple[TrainConfig, ModelConfig, SourcePair | None]:
    """Settings without anything left to inherit, the description of the run's networks, and the source."""
    source = _load_source(config, method, model)
    described = model if source is None else method.target_model(source.cfg, config)
    if config.data_scale is None:
        inherited = 1.0 if source is None else float(source.meta.get("data_scale", 1.0))
        config = dataclasses.replace(config, data_scale=inherited)
    return config, described, source


def load_data(config: TrainConfig, model: ModelConfig, say: Console, parallel: Parallel) -> Data:
    """Training images and, where there are any, held-out ones; those of --eval-data on rank 0 alone, which evaluates.

    Raises:
        DataError: a set cannot be read, or --holdout leaves too few images to train on.
    """

    def load(path: str) -> ImageSet:
        images = load_image_set(
            image_path(path), size=model.size, channels=model.channels, fit=config.fit, alpha=config.alpha
        )
        if rejects := images.manifest["rejects"]:
            say.line(f"{path}: {len(rejects)} of {len(rejects) + len(images)} files left out; see data_manifest.json")
        return images

    images = load(config.data)
    if config.eval_data is not None:
        return Data(images, parallel.on_main("the evaluation images", partial(load, config.eval_data)), "heldout")
    if config.holdout == 0:
        return Data(images, images, "train")
    if config.holdout > len(images) - 2:
        raise DataError(
            f"--holdout {config.holdout} leaves fewer than 2 of the {len(images)} images of {config.data} to train on"
        )
    order = torch.from_numpy(keyed.permutation(config.seed, "holdout", 0, len(images)))
    held, kept = order[: config.holdout].sort().values, order[config.holdout :].sort().values
    return Data(images.select(kept), images.select(held), "heldout")


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


def _agree_on_settings(parallel: Parallel, method: str, config: TrainConfig, model: ModelConfig, data: Data) -> None:
    """Every process must have been started alike; only paths may differ from machine to machine."""
    paths = ("data", "eval_data", "source", "outdir")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in paths}
    state = [method, settings, model.to_json(), data.training.manifest["sha256"]]
    parallel.agree(state, "the settings and training images", UsageError)


def _load_source(config: TrainConfig, method: TransferMethod, model: ModelConfig | None) -> SourcePair | None:
    if config.source is None:
        if method.needs_source:
            raise UsageError(
                f"`adafm train {method.name}` starts from a source: add --source FOLDER or --source bundled"
            )
        if model is None:
            raise UsageError(
                "the networks' sizes are not known: give --source (for its sizes only) or use `adafm pretrain`"
            )
        return None
    return load_pair(source_path(config.source))


def _evaluator(config: TrainConfig, data: Data, console: Console) -> Evaluator | None:
    if config.eval_every < 0 or data.reals is None:
        return None
    extractor = get_extractor(config.extractor)
    words = {
        "heldout": "images withheld from training",
        "train": "the training images themselves (nothing is held out)",
    }
    console.line(
        f"evaluation: {config.eval_samples} samples against {len(data.reals)} {words[data.split]}, {extractor.name}"
    )
    return Evaluator(extractor, data.reals.pixels, data.split, data.training.pixels, config.eval_samples, config.seed)


def _describe(
    run: RunDirectory, console: Console, assembly: Assembly, config: TrainConfig, data: Data, source: SourcePair | None
) -> None:
    """Everything a run writes before its first step."""
    networks: Networks = assembly.networks
    rows = block_table(networks.generator, networks.discriminator, networks.model)
    write_blocks(run.root / "blocks.json", rows)
    console.line(format_block_table(rows))
    compute = "float32" if assembly.autocast is None else str(assembly.autocast).removeprefix("torch.")
    console.line(f"device {assembly.device}, compute type {compute}, {torch.get_num_threads()} threads")
    for remark in assembly.remarks:
        console.line(remark)
    parallel = assembly.parallel
    if parallel.grouped:
        each = len(parallel.samples(config.batch))
        console.line(f"{parallel.world} processes, each with {each} of the {config.batch} images of a step")
    manifest = {"training": data.training.manifest, "evaluation": None, "split": data.split}
    if data.reals is not None and data.reals is not data.training:
        manifest["evaluation"] = data.reals.manifest
    write_atomic(run.root / "data_manifest.json", json.dumps(manifest, indent=1))
    run.write_environment(
        {
            "device": str(assembly.device),
            "processes": parallel.world,
            "compute": compute,
            "source": None if source is None else source.meta,
        }
    )


def _check_data(run: RunDirectory, data: Data, allow: bool) -> None:
    path = run.root / "data_manifest.json"
    if allow or not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["training"]["images"]
    now = data.training.manifest["images"]
    if before != now:
        changed = {f["name"] for f in before} ^ {f["name"] for f in now}
        detail = f"{len(changed)} names differ" if changed else "same names, other contents"
        raise DataError(
            f"the training images are not those the run began with ({detail}); restore them, or pass "
            "--allow-data-change to continue inexactly"
        )


def _train(trainer: Trainer, run: RunDirectory) -> Path:
    parallel = trainer.assembly.parallel
    try:
        trainer.run()
        if not trainer.assembly.method.needs_source:
            folder = parallel.on_main("the source networks", partial(save_source, trainer, run))
            trainer.console.line(f"source networks for --source: {folder}")
    finally:
        if parallel.main and run.stats.is_file():
            report = write_report(run.root)
            trainer.console.line(f"report: {report}")
    return run.root
