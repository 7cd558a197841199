"""Several tasks of GAN memory one after another: a run for each, one bank, and a resume that continues exactly.

``OUT/tasks.json`` holds the order and the settings, ``OUT/NAME`` the run of a task, ``OUT/bank`` what all have learned.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import Interrupted, UsageError
from ..methods import method_by_name
from ..methods.config import TrainConfig
from ..methods.config_file import read_config, write_config
from ..methods.gan_memory import task_name
from ..models.memory_file import FILE, describe_bank
from .bank import open_bank, size_table, task_sizes
from .checkpoint import write_atomic
from .parallel import Parallel, launched_by_torchrun
from .precision import resolve_device
from .progress import Console, SilentConsole
from .run_data import load_data
from .rundir import RunDirectory
from .start import resolve_run, resume_run, start_run

METHOD = "gan-memory"
ORDER = "tasks.json"
FORMAT = 1
# Names in OUT that are no task's.
_TAKEN = ("bank", "lock", "log.txt", ORDER)


@dataclass(frozen=True)
class Task:
    """One task: its name, its training images, and held-out ones or None."""

    name: str
    data: str
    eval_data: str | None = None


def start_tasks(config: TrainConfig, tasks: Sequence[Task]) -> Path:
    """Train ``tasks`` in their order with the settings of ``config``; returns its outdir.

    Everything that can be seen to be wrong with any of them is said before the first is trained. Every task starts from
    the source (in low-rank storage, from what the bank holds), so what it learns depends on no later one.

    Raises:
        UsageError: names that repeat or cannot be folders; a folder that holds tasks or a run already; torchrun.
        DataError: images of a task cannot be read. SourceError: the source does not fit.
    """
    out = Path(config.outdir)
    _one_process()
    if config.task is not None:
        raise UsageError(f"--task {config.task}: several --data are named one by one, as NAME=FOLDER; leave --task out")
    if is_sequence(out):
        raise UsageError(f"--outdir {out} holds tasks already; continue them with `adafm train --resume {out}`")
    RunDirectory(out).refuse_existing()
    _check_names(tasks)
    for task in tasks:
        RunDirectory(out / task.name).refuse_existing()
    check_tasks(config, tasks)
    out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config)
    rows = [dataclasses.asdict(task) for task in tasks]
    text = json.dumps({"format": FORMAT, "method": METHOD, "tasks": rows, "settings": settings}, indent=1)
    write_atomic(out / ORDER, text)
    return _train(out, config, tasks)


def resume_tasks(folder: str | Path, *, allow_data_change: bool = False) -> Path:
    """Continue with the first task that is not finished: exactly, from its newest checkpoint.

    Raises:
        UsageError: there are no tasks in ``folder``, or its tasks.json cannot be read.
    """
    out = Path(folder)
    _one_process()
    path = out / ORDER
    if not path.is_file():
        raise UsageError(f"{out} holds no tasks: there is no {ORDER} in it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise UsageError(f"{path} is of format {found['format']}; this version reads format {FORMAT}")
        tasks = [Task(**row) for row in found["tasks"]]
        settings = {n: tuple(v) if isinstance(v, list) else v for n, v in found["settings"].items()}
        config = TrainConfig(**{**settings, "outdir": str(out)})
        if not tasks:
            raise KeyError("no task")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as the order of tasks: {type(error).__name__}: {error}") from error
    return _train(out, config, tasks, allow_data_change)


def is_sequence(folder: str | Path) -> bool:
    """Whether ``folder`` holds tasks that were trained one after another."""
    return (Path(folder) / ORDER).is_file()


def check_tasks(config: TrainConfig, tasks: Sequence[Task]) -> None:
    """Read the source and every task's images as its run will.

    Raises:
        AdafmError: what the run of a task would raise before its first step.
    """
    parallel = Parallel(resolve_device(config.device))
    for task in tasks:
        settled, described, _ = resolve_run(method_by_name(METHOD), of_task(config, task), None)
        load_data(settled, described, SilentConsole(), parallel)


def of_task(config: TrainConfig, task: Task) -> TrainConfig:
    """The settings of one task's run."""
    out = Path(config.outdir)
    return dataclasses.replace(
        config,
        data=task.data,
        eval_data=task.eval_data,
        outdir=str(out / task.name),
        bank=str(out / "bank") if config.bank is None else config.bank,
        task=task.name,
    )


def _train(out: Path, config: TrainConfig, tasks: Sequence[Task], allow_data_change: bool = False) -> Path:
    console = Console(out / "log.txt")
    with _locked(out):
        for number, task in enumerate(tasks, 1):
            settings, run = of_task(config, task), RunDirectory(out / task.name)
            if _finished(settings, run):
                continue
            console.line(f"task {number} of {len(tasks)}: {task.name}, in {run.root}")
            try:
                if run.config.is_file() and any(run.checkpoints.glob("step*")):
                    _point_at_bank(run, settings)
                    resume_run(run.root, allow_data_change=allow_data_change)
                else:
                    # Stopped before its first checkpoint: there is nothing of it to continue.
                    if run.config.is_file():
                        shutil.rmtree(run.root)
                    start_run(METHOD, settings)
            except Interrupted as error:
                raise Interrupted(f"{error}; for this task and those after it: `adafm train --resume {out}`") from error
        opened = open_bank(settings.bank, *settings.source, settings.source_weights)
        sizes = {size.name: size for size in task_sizes(opened)}
        kids = {task.name: _kid(RunDirectory(out / task.name)) for task in tasks}
        console.line(size_table([sizes[task.name] for task in tasks], kids))
    return out


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    directory = RunDirectory(out)
    directory.lock()
    try:
        yield
    finally:
        directory.unlock()


def _finished(settings: TrainConfig, run: RunDirectory) -> bool:
    """The task is in the bank and its report, the last thing a run writes, is there."""
    if not (Path(settings.bank) / FILE).is_file() or not (run.root / "report.html").is_file():
        return False
    return settings.task in (task["name"] for task in describe_bank(settings.bank)["tasks"])


def _point_at_bank(run: RunDirectory, settings: TrainConfig) -> None:
    """Let the run's settings name the bank where it is now: the folder may have been moved."""
    method, config, model = read_config(run.config)
    if config.bank != settings.bank:
        write_config(run.config, method, dataclasses.replace(config, bank=settings.bank), model)


def _kid(run: RunDirectory) -> str:
    """The last KID of a run with its interval, or ``-`` where none was taken."""
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.is_file() else []
    metrics = json.loads(lines[-1])["metrics"] if lines else {}
    for name, entry in metrics.items():
        if name.startswith("kid["):
            between = "" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]"
            return f"{entry['value']:.3f}{between}"
    return "-"


def _check_names(tasks: Sequence[Task]) -> None:
    seen: dict[str, str] = {}
    for task in tasks:
        task_name(TrainConfig(data=task.data, outdir="", task=task.name))
        # Some file systems do not tell upper from lower case.
        key = task.name.casefold()
        if key in _TAKEN:
            raise UsageError(f"a task cannot be called {task.name!r}: that is a file or folder beside the tasks' own")
        if key in seen:
            raise UsageError(f"--data {task.name}={task.data}: a task of that name is {seen[key]} already")
        seen[key] = f"{task.name}={task.data}"


def _one_process() -> None:
    if launched_by_torchrun():
        raise UsageError(
            "several tasks are trained in one process; under torchrun train one after another, each with --bank BANK "
            "--task NAME and one --data"
        )
