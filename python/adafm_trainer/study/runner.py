"""Carries a plan out: makes what a run needs, starts or continues it, and passes over what is done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..data.packaged import GENERATORS, packaged_file
from ..errors import DivergedError, Interrupted, SourceError, UsageError
from ..methods.config import TrainConfig
from ..methods.config_file import read_config
from ..models.catalogue import describe
from ..trainer.checkpoint import write_atomic
from ..trainer.rundir import RunDirectory
from ..trainer.start import resume_run, start_run
from .images import image_set
from .plan import Drawn, Images, Outside, Run, Scale


class Runner:
    """Runs of a study below ``root``: ``data/``, ``outside/``, ``runs/<name>/`` and ``seconds.json``.

    ``deadline`` is a time of ``time.monotonic()``, from which on no further run is started.
    """

    def __init__(self, root: Path, scale: Scale, say: Callable[[str], None], deadline: float) -> None:
        self.root, self.scale, self.say, self.deadline = root, scale, say, deadline
        self._claim()

    def folder(self, run: Run) -> Path:
        return self.root / "runs" / run.name

    def do(self, run: Run) -> None:
        """Bring ``run`` to its last step, and before it the runs it starts from.

        Raises:
            Interrupted: the deadline has passed, or a signal asked to stop. Both can be continued.
            UsageError: the run's folder holds one of other settings.
        """
        for source in run.sources:
            if isinstance(source, Run):
                self.do(source)
        if self._begun(run):
            self._check(run)
        if self.done(run):
            return
        if time.monotonic() >= self.deadline:
            raise Interrupted(f"the time is up before {run.name}; the same command continues")
        started = time.monotonic()
        config = self._config(run)
        folder = self.folder(run)
        self.say(f"{run.name}: {run.method}, {config.steps} steps")
        try:
            if self._begun(run):
                resume_run(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                start_run(run.method, config, None if run.model is None else describe(dict(run.model)))
        except DivergedError as error:
            write_atomic(folder / "diverged.txt", f"{error}\n")
            self.say(f"{run.name}: {error}")
        finally:
            self._count(run, time.monotonic() - started)

    def done(self, run: Run) -> bool:
        """Whether the run is complete, evaluation and all, or was given up as diverged."""
        if self.diverged(run):
            return True
        pointer = self.folder(run) / "checkpoints" / "last.json"
        if not pointer.is_file():
            return False
        step = json.loads(pointer.read_text(encoding="utf-8"))["step"]
        last = self.metrics(run)[-1:]
        judged = run.settings.get("eval_every", 0) < 0 or (last and last[0]["step"] == step)
        saved = run.method != "scratch" or (self.folder(run) / "source" / "model.json").is_file()
        return step == run.settings["steps"] and bool(judged) and saved

    def diverged(self, run: Run) -> bool:
        return (self.folder(run) / "diverged.txt").is_file()

    def metrics(self, run: Run) -> list[dict]:
        """The run's evaluations, earliest first: step and metrics."""
        path = self.folder(run) / "metrics.jsonl"
        if not path.is_file():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the last line of a killed run
        return rows

    def environment(self, run: Run) -> dict:
        """What the run was begun with, as it wrote it down."""
        return json.loads((self.folder(run) / "environment.json").read_text(encoding="utf-8"))

    def images(self, images: Images) -> Path:
        """The image set, made where it is not there."""
        outside = {}
        if isinstance(images, Drawn):
            outside = {name: self.outside(name) for name in images.generators}
        return image_set(images, self.root / "data", outside)

    def source(self, source: Run | Outside) -> Path:
        """What ``--source`` is given for it."""
        if isinstance(source, Outside):
            return self.outside(source.name)
        folder = self.folder(source) / "source"
        if not (folder / "model.json").is_file():
            raise SourceError(f"{folder} was not trained to its end: see {self.folder(source)}")
        return folder

    def outside(self, name: str) -> Path:
        """The generator ``name`` that others trained, as a source folder.

        Raises:
            UsageError: its distribution is not installed. SourceError: it cannot be converted.
        """
        folder = self.root / "outside" / name
        if (folder / "model.json").is_file():
            return folder
        file = packaged_file(*GENERATORS[name])
        command = [sys.executable, "-m", "adafm_trainer.cli", "convert", str(file), str(folder), "--arch", "dcgan"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SourceError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip()}")
        return folder

    def seconds(self, run: Run) -> float:
        """Wall-clock seconds that the run has taken so far, over all its pieces."""
        return self._ledger().get(run.name, 0.0)

    def _config(self, run: Run) -> TrainConfig:
        return TrainConfig(
            data=str(self.images(run.images)),
            outdir=str(self.folder(run)),
            eval_data=None if run.heldout is None else str(self.images(run.heldout)),
            source=tuple(str(self.source(source)) for source in run.sources),
            seed=run.seed,
            **run.settings,
        )

    def _begun(self, run: Run) -> bool:
        return (self.folder(run) / "checkpoints" / "last.json").is_file() and (
            RunDirectory(self.folder(run)).config.is_file()
        )

    def _check(self, run: Run) -> None:
        """Refuse a run that was begun otherwise."""
        method, before, _ = read_config(self.folder(run) / "config.yaml")
        for name, value in {"method": run.method, "seed": run.seed, **run.settings}.items():
            found = method if name == "method" else getattr(before, name)
            if found != value:
                raise UsageError(
                    f"{self.folder(run)} was begun with {name} {found!r}, and the study now has {value!r}: name "
                    "another --outdir, or remove that folder"
                )

    def _claim(self) -> None:
        """One folder, one scale: a quick study and a whole one must not share runs."""
        path = self.root / "scale.json"
        now = json.dumps(vars(self.scale), indent=1)
        if path.is_file():
            if path.read_text(encoding="utf-8") != now:
                raise UsageError(f"{self.root} holds a study of other sizes ({path}): name another --outdir")
            return
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(path, now)

    def _ledger(self) -> dict[str, float]:
        path = self.root / "seconds.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _count(self, run: Run, seconds: float) -> None:
        ledger = self._ledger()
        ledger[run.name] = round(ledger.get(run.name, 0.0) + seconds, 1)
        write_atomic(self.root / "seconds.json", json.dumps(ledger, indent=1))
