"""`adafm train METHOD`, `adafm train --config FILE` and `adafm train --resume RUN`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..errors import UsageError
from ..locate import source_path
from ..methods.config import TrainConfig
from ..methods.config_file import read_recipe
from ..methods.presets import METHODS, preset
from ..models.architecture import Description
from ..models.catalogue import describe
from ..models.source import read_description
from ..trainer.dry_run import dry_run
from ..trainer.start import resume_run, start_run
from ..trainer.tasks import METHOD as MEMORY
from ..trainer.tasks import Task, check_tasks, is_sequence, of_task, resume_tasks, start_tasks
from .flags import parse
from .task_flags import take_tasks


@dataclass(frozen=True)
class ResumeArgs:
    """Continue a run exactly where its newest checkpoint left it."""

    resume: Path
    """Run directory, or that of several tasks."""
    steps: int | None = None
    """New length of the run in optimizer steps; the rest of its settings cannot change."""
    allow_data_change: bool = False
    """Continue although the training images are not those the run began with (the result is then not exact)."""


@dataclass(frozen=True)
class TrainArgs(TrainConfig):
    """One training run. Lengths and intervals count optimizer steps: one generator step and --critic-steps
    discriminator steps each."""

    data: str
    """Training images: a folder or a zip of images. `gan-memory` takes several, each as NAME=FOLDER: they are tasks
    that are trained one after another into the bank OUTDIR/bank, unless --bank names another. --eval-data is then given
    in the same form."""
    source: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Source networks: a folder written by `adafm pretrain` or `adafm convert`, or `bundled`. `minegan` takes several,
    one --source each."""
    dry_run: bool = False
    """Build everything as the run would and take a few steps, print the networks, the memory by part and the time of a
    step, and end; nothing is written."""


def main(argv: list[str]) -> int:
    if any(a == "--resume" or a.startswith("--resume=") for a in argv):
        args = parse(ResumeArgs, "adafm train", argv)
        if not is_sequence(args.resume):
            resume_run(args.resume, steps=args.steps, allow_data_change=args.allow_data_change)
        elif args.steps is None:
            resume_tasks(args.resume, allow_data_change=args.allow_data_change)
        else:
            raise UsageError(
                f"--steps {args.steps}: {args.resume} holds several tasks, of which those in the bank cannot change; "
                "leave it out"
            )
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if any(a == "--config" or a.startswith("--config=") for a in argv):
        method, args, model = parse_rerun(argv)
        return _run(method, args, model)
    method, rest = argv[0], argv[1:]
    if method not in METHODS:
        raise UsageError(
            f"unknown method {method!r}; expected one of {', '.join(METHODS)}, --config FILE or --resume RUN"
        )
    tasks, rest = take_tasks(method, rest)
    return _run(method, parse_config(method, f"adafm train {method}", rest), tasks=tasks)


def parse_config(method: str, prog: str, argv: list[str]) -> TrainArgs:
    """Flags over the preset of ``method`` for its first source's family; ``--faithful`` among them chooses the
    published settings."""
    values = preset(method, "--faithful" in argv, _family(argv))
    return parse(TrainArgs, prog, argv, TrainArgs(data=tyro.MISSING, outdir=tyro.MISSING, **values))


def _family(argv: list[str]) -> str:
    """``arch`` of the first source among the flags; GP-GAN's where there is none, or none that can be read yet."""
    joined = [part for a in argv for part in (a.split("=", 1) if a.startswith("--source=") else [a])]
    given = [joined[k + 1] for k, a in enumerate(joined[:-1]) if a == "--source"]
    if not given:
        return "resnet"
    description = source_path(given[0]) / "model.json"
    if not description.is_file():
        return "resnet"
    return read_description(description).arch


def parse_rerun(argv: list[str]) -> tuple[str, TrainArgs, Description | None]:
    """A run's config.yaml, or a recipe, with the other flags of ``argv`` applied: method, settings, networks.

    A recipe describes no networks: they are the source's, and what it leaves out is the preset's of its method for the
    source's family, the published one where it or a flag says so.
    """
    joined = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    at = joined.index("--config")
    if at + 1 == len(joined):
        raise UsageError("--config names no file; give a run's config.yaml or a recipe")
    path, rest = Path(joined[at + 1]), joined[:at] + joined[at + 2 :]
    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file")
    method, values, model = read_recipe(path)
    if method not in METHODS:
        raise UsageError(f"{path}: unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if rest and rest[0] in METHODS:
        if rest[0] != method:
            raise UsageError(f"--config {path} is of method {method!r}, the command asks for {rest[0]!r}")
        rest = rest[1:]
    named = values.get("source") or ()
    sources = [f"--source={source}" for source in ((named,) if isinstance(named, str) else named)]
    faithful = bool(values.get("faithful")) or "--faithful" in rest
    before = {} if model is not None else preset(method, faithful, _family([*rest, *sources]))
    start = TrainArgs(**{"data": tyro.MISSING, "outdir": tyro.MISSING, **before, **values})
    return method, parse(TrainArgs, "adafm train", rest, start), None if model is None else describe(model)


def _run(method: str, args: TrainArgs, model: Description | None = None, tasks: Sequence[Task] = ()) -> int:
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})
    if tasks and args.dry_run:
        check_tasks(config, tasks)
        dry_run(method, of_task(config, tasks[0]))
    elif args.dry_run:
        dry_run(method, config, model)
    elif tasks:
        start_tasks(config, tasks)
    else:
        start_run(method, config, model)
    return 0


def _usage() -> str:
    methods = "\n".join(f"  adafm train {name} --source S --data D --outdir RUN" for name in METHODS)
    methods += f"\n  adafm train {MEMORY} --source S --data NAME=FOLDER --data NAME=FOLDER ... --outdir TASKS"
    rest = "  adafm train --config RUN/config.yaml --outdir NEW\n  adafm train --resume RUN"
    rest += "\n  adafm train --config RECIPE --source S --data D --outdir RUN     a file of settings over a preset"
    rest += "\n  adafm train METHOD ... --dry-run     memory and time of a step; writes nothing"
    return f"usage:\n{methods}\n{rest}\n\nadafm train METHOD --help lists the flags of a method."
