"""Whole runs of several processes: written once, equal to a run of one, resumable, stopped and refused together."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from adafm_trainer.cli.train import parse_config
from adafm_trainer.trainer.checkpoint import load_checkpoint
from adafm_trainer.trainer.start import resume_run, start_run
from ranks import run_ranks, start_ranks
from safetensors.torch import load_file
from tiny import digest, image_folder, settings, source_folder

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
COMMAND = re.search(r"^torchrun .*$", README, re.MULTILINE)[0]
SHORT = ["--steps", "1", "--tick", "1", "--snap", "1", "--eval-every", "-1", "--batch", "2", "--precision", "fp32"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def world(tmp_path):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    return tmp_path


def start(rank: int, root: Path, name: str, changes: dict, per_rank: dict | None = None) -> str:
    changes = {**changes, **(per_rank or {}).get(rank, {})}
    return str(start_run("adafm", settings(root, name, freeze_g=2, dist_timeout=20.0, **changes)))


def resume(rank: int, run: Path, steps: int | None = None) -> str:
    return str(resume_run(run, steps=steps))


def rows(run: Path, file: str = "stats.jsonl") -> list[dict]:
    found = [json.loads(line) for line in (run / file).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("wall", "seconds_per_step")} for row in found]


def assert_close_runs(found: Path, expected: Path) -> None:
    """The same training but for the order of float32 sums."""
    (_, *found_states), (_, *expected_states) = (load_checkpoint(run / "checkpoints") for run in (found, expected))
    for mine, theirs in zip(found_states[:2], expected_states[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert found_states[2]["loop"]["step"] == expected_states[2]["loop"]["step"]
    for mine, theirs in zip(rows(found), rows(expected), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_run_of_two_processes_equals_one_and_resumes_exactly(world):
    changes = {"adafm_start": 3, "eval_every": 3, "eval_samples": 16, "extractor": "random-v1", "holdout": 4}
    alone = start_run("adafm", settings(world, "alone", freeze_g=2, **changes))
    outcomes = run_ranks(start, world, "two", changes)
    assert [outcome.value for outcome in outcomes] == [str(world / "two")] * 2
    assert_close_runs(world / "two", alone)
    assert [row["step"] for row in rows(world / "two", "metrics.jsonl")] == [3, 6]
    assert not (world / "two" / "lock").exists() and (world / "two" / "report.html").is_file()
    log = (world / "two" / "log.txt").read_text()
    assert log.count("2 processes, each with 2 of the 4 images of a step") == 1 and log.count("step 6/6") == 1

    run_ranks(start, world, "part", {**changes, "steps": 3})
    outcomes = run_ranks(resume, world / "part", 6)
    assert [outcome.kind for outcome in outcomes] == [None, None]
    assert digest(world / "part") == digest(world / "two")
    assert rows(world / "part")[-1] == rows(world / "two")[-1]


def test_another_number_of_processes_may_continue_and_is_told(world):
    run = start_run("adafm", settings(world, "run", freeze_g=2, steps=2))
    whole = start_run("adafm", settings(world, "whole", freeze_g=2, steps=4))
    assert [outcome.kind for outcome in run_ranks(resume, run, 4)] == [None, None]
    assert "1 processes before, 2 now" in (run / "log.txt").read_text()
    assert_close_runs(run, whole)


def test_a_stop_asked_of_one_rank_stops_all_after_the_same_step(world):
    changes = {"steps": 100_000, "tick": 1000, "snap": 100_000}
    ranks = start_ranks(start, world, "run", changes)
    pointer = world / "run" / "checkpoints" / "last.json"
    deadline = time.monotonic() + 60
    while not pointer.exists():
        assert time.monotonic() < deadline and all(p.is_alive() for p in ranks.processes)
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    outcomes = ranks.outcomes()
    assert [outcome.kind for outcome in outcomes] == ["Interrupted"] * 2
    assert [outcome.exit_code for outcome in outcomes] == [75, 75]
    step = json.loads(pointer.read_text())["step"]
    assert step > 0 and all(f"stopped after step {step} of" in outcome.text for outcome in outcomes)
    assert (world / "run" / "report.html").is_file() and not (world / "run" / "lock").exists()


def test_processes_that_were_started_differently_are_refused(world):
    for outcome in run_ranks(start, world, "run", {}, {1: {"lr_g": 0.1}}):
        assert outcome.kind == "UsageError" and "the settings and training images of rank 1 differ" in outcome.text


def test_an_existing_run_is_refused_by_all(world):
    start_run("adafm", settings(world, "run", freeze_g=2, steps=1))
    main, other = run_ranks(start, world, "run", {"steps": 1})
    assert main.kind == "UsageError" and "already holds a run" in main.text
    assert other.kind == "PeerError" and "already holds a run" in other.text
    assert main.exit_code == other.exit_code == 2


def torchrun(command: str, flags: list[str], folder: Path, processes: int = 2) -> subprocess.CompletedProcess:
    """The README's command with ``flags`` added, run in ``folder``."""
    program, *arguments = shlex.split(command)
    assert program == "torchrun"
    arguments[arguments.index("--nproc-per-node") + 1] = str(processes)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, *flags],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_alone(device: str, **changes) -> Path:
    flags = [*shlex.split(COMMAND.partition("train adafm")[2]), *SHORT, "--device", device, "--outdir", "runs/alone"]
    return start_run("adafm", dataclasses.replace(parse_config("adafm", "adafm train adafm", flags), **changes))


def assert_went_the_same_way(found: Path, expected: Path) -> None:
    """The distance between two runs' ends is at most a hundredth of their way.

    It is not rounding alone: where a gradient is next to zero, Adam's step has its full size and either sign.
    """
    for file in ("model.safetensors", "ema.safetensors"):
        start, mine = (load_file(found / "checkpoints" / f"step{step:08d}" / file) for step in (0, 1))
        theirs = load_file(expected / "checkpoints" / "step00000001" / file)
        apart, way = (
            torch.stack([(a[k].double() - theirs[k].double()).norm() for k in theirs]).norm() for a in (mine, start)
        )
        assert way > 0 and apart < 0.01 * way, f"{file}: {apart:.3g} apart after a way of {way:.3g}"


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "my_images")
    done = torchrun(COMMAND, [*SHORT, "--device", "cpu"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1/1") == 1
    assert_went_the_same_way(tmp_path / "runs" / "two", run_alone("cpu"))


def test_a_refusal_under_torchrun(tmp_path):
    done = torchrun(COMMAND, ["--batch", "3"], tmp_path)
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    assert "adafm train: --batch 3 cannot be shared equally by 2 processes: use --batch 2 or 4" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_command_of_the_readme_on_every_gpu(tmp_path, monkeypatch):
    """With one GPU the group has one process; gradients go through NCCL all the same."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "my_images")
    devices = torch.cuda.device_count()
    batch = ["--batch", str(2 * devices)]
    done = torchrun(COMMAND, [*SHORT, *batch, "--device", "cuda"], tmp_path, devices)
    assert done.returncode == 0, done.stderr
    assert f"{devices} processes, each with 2 of" in done.stdout
    assert_went_the_same_way(tmp_path / "runs" / "two", run_alone("cuda", batch=2 * devices))
