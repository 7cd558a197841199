"""Several tasks of GAN memory in one run: the bank they fill, exact resume, and what is refused before it begins."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.errors import DataError, Interrupted, SourceError, UsageError
from adafm_trainer.methods import gan_memory
from adafm_trainer.models.memory_bank import MemoryBank
from adafm_trainer.models.memory_file import FILE, read_tensors
from adafm_trainer.models.memory_mixed import MixedTaskGenerator
from adafm_trainer.models.source import load_pair
from adafm_trainer.trainer.load import load_run
from adafm_trainer.trainer.loop import Trainer
from adafm_trainer.trainer.start import resume_run, start_run
from adafm_trainer.trainer.tasks import Task, resume_tasks, start_tasks
from memories import WIDE, latents
from stopping import Killed, stop_after
from tiny import digest, image_folder, settings, source_folder

NAMES = ("cats", "dogs", "hens", "owls", "bats")
FLAGS = (
    "--steps 2 --batch 4 --precision fp32 --device cpu --warmup 2 --r1-interval 2 --tick 2 --snap 2 --holdout 4 "
    "--extractor random-v1 --eval-samples 8"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for number, name in enumerate(NAMES):
        image_folder(folder / name, seed=number)
    source_folder(folder / "source")
    source_folder(folder / "wide", WIDE)
    return folder


@pytest.fixture(scope="module")
def five(world):
    """Five tasks from the command line; their folder, what was printed, and the bank's tensors after each task."""
    after = []
    with pytest.MonkeyPatch.context() as patch:
        add = gan_memory.finish_task

        def kept(folder, *rest):
            line = add(folder, *rest)
            after.append(dict(read_tensors(folder)))
            return line

        patch.setattr(gan_memory, "finish_task", kept)
        data = [part for name in NAMES for part in ("--data", f"{name}={world / name}")]
        out = world / "five"
        arguments = ["train", "gan-memory", *data, "--source", str(world / "source"), "--outdir", str(out), *FLAGS]
        assert cli.main(arguments) == 0
    return out, (out / "log.txt").read_text(), after


def sequence(world: Path, name: str, count: int = 3, **changes) -> tuple:
    """Settings and tasks of a run of ``count`` tasks in ``world / name``."""
    config = settings(world, name, steps=2, **{"source": (str(world / "source"),), **changes})
    return config, [Task(task, str(world / task)) for task in NAMES[:count]]


def bank_bytes(folder: Path) -> bytes:
    return (folder / "bank" / FILE).read_bytes()


def source_state(folder: Path) -> dict:
    return load_pair(folder).average_state


def test_five_tasks_in_one_run(world, five) -> None:
    out, printed, _ = five
    bank = MemoryBank.load(out / "bank", source_state(world / "source"))
    assert tuple(bank.names) == NAMES
    assert [row["name"] for row in json.loads((out / "tasks.json").read_text())["tasks"]] == list(NAMES)
    table = printed.splitlines()[-len(NAMES) - 2 :]
    assert table[0].split() == ["task", "KID", "bytes", "bytes", "in", "low", "rank"]
    for line, name in zip(table[1:], NAMES, strict=False):
        (kid,) = (row["metrics"] for row in map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines()))
        value = next(entry["value"] for key, entry in kid.items() if key.startswith("kid["))
        assert line.startswith(name) and f" {value:.3f} [" in line
        assert f"  {bank.nbytes(name)['generator']:,}  " in line
        assert (out / name / "report.html").is_file()
    assert table[-1].startswith("5 tasks")


def test_no_task_changes_an_earlier_one(five) -> None:
    _, _, after = five
    assert len(after) == len(NAMES)
    for count, (before, tensors) in enumerate(zip(after, after[1:], strict=False), 1):
        assert {key.partition(".")[0] for key in before} == {str(n) for n in range(count)}
        assert before.keys() < tensors.keys()
        assert all(torch.equal(tensors[key], value) for key, value in before.items())
    last = after[-1]
    for key in (key.partition(".")[2] for key in last if key.startswith("0.")):
        if not key.endswith("shift"):
            values = [last[f"{n}.{key}"] for n in range(len(NAMES))]
            assert all(not torch.equal(values[0], value) for value in values[1:]), "tasks learned the same"


def test_a_recalled_task_is_its_run_s_generator_bit_for_bit(world, five) -> None:
    out, _, _ = five
    bank = MemoryBank.load(out / "bank", source_state(world / "source"))
    z = latents(bank.model, 6, torch.float32)
    images = {name: bank.generator(name)(z) for name in NAMES}
    for name in NAMES:
        assert torch.equal(images[name], load_run(out / name, "cpu").generator(z))
    assert not torch.equal(images["cats"], images["dogs"])
    order = ["hens", "cats", "bats", "owls", "cats", "dogs"]
    mixed = MixedTaskGenerator(bank)(z, order)
    expected = torch.stack([images[name][n] for n, name in enumerate(order)])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["signal", "kill", "kill at the start", "kill before the report"])
def test_resume_continues_exactly(world, tmp_path, monkeypatch, how) -> None:
    config, tasks = sequence(world, "exact")
    whole = Path(config.outdir)
    if not (whole / "bank").is_dir():
        start_tasks(config, tasks)
    config = dataclasses.replace(config, outdir=str(tmp_path / "part"))
    with monkeypatch.context() as patch:
        if how == "signal":
            stop_after(patch, 3)
        elif how == "kill":
            stop_after(patch, 3, kill=True)
        elif how == "kill at the start":
            save = Trainer._save

            def fail(trainer):
                if trainer.step == 0 and "dogs" in trainer.config.data:
                    raise Killed
                save(trainer)

            patch.setattr(Trainer, "_save", fail)
        else:
            patch.setattr("adafm_trainer.trainer.start.write_report", lambda root: 1 / (root.name != "dogs"))
        with pytest.raises((Interrupted, Killed, ZeroDivisionError)) as stopped:
            start_tasks(config, tasks)
    if how == "signal":
        assert f"adafm train --resume {tmp_path / 'part'}`" in str(stopped.value)
        with pytest.raises(UsageError, match="holds tasks already; continue them with `adafm train --resume"):
            start_tasks(config, tasks)
    # The folder may move before it is resumed.
    moved = (tmp_path / "part").rename(tmp_path / "moved")
    assert cli.main(["train", "--resume", str(moved)]) == 0
    assert not (tmp_path / "part").exists()
    assert bank_bytes(moved) == bank_bytes(whole)
    assert [digest(moved / task.name) for task in tasks] == [digest(whole / task.name) for task in tasks]
    assert cli.main(["train", "--resume", str(moved)]) == 0
    assert bank_bytes(moved) == bank_bytes(whole)


def test_low_rank_tasks_resume_exactly(world, tmp_path, monkeypatch) -> None:
    config, tasks = sequence(world, "low", 2, source=(str(world / "wide"),), storage="low-rank", batch=2)
    start_tasks(config, tasks)
    part = dataclasses.replace(config, outdir=str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 3)
        start_tasks(part, tasks)
    resume_tasks(tmp_path)
    assert bank_bytes(tmp_path) == bank_bytes(Path(config.outdir))
    assert MemoryBank.load(tmp_path / "bank", source_state(world / "wide")).storage == "low-rank"


def test_tasks_can_follow_those_of_a_bank(world, tmp_path) -> None:
    bank = str(tmp_path / "bank")
    start_run("gan-memory", settings(world, source=(str(world / "source"),), data=str(world / "owls"), steps=2,
                                     outdir=str(tmp_path / "run"), bank=bank))  # fmt: skip
    config, tasks = sequence(world, "unused", 1, bank=bank)
    start_tasks(dataclasses.replace(config, outdir=str(tmp_path / "more")), tasks)
    assert MemoryBank.load(bank, source_state(world / "source")).names == ["owls", "cats"]
    with pytest.raises(UsageError, match=r"task 'cats' is in the bank .* already"):
        start_tasks(dataclasses.replace(config, outdir=str(tmp_path / "again")), tasks)
    assert not (tmp_path / "again").exists()


def test_a_task_waits_for_its_source(world, tmp_path, monkeypatch) -> None:
    source, bank = shutil.copytree(world / "source", tmp_path / "source"), tmp_path / "bank"
    config = settings(world, source=(str(source),), data=str(world / "cats"), steps=2, bank=str(bank), task="first")
    config = dataclasses.replace(config, outdir=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 1)
        start_run("gan-memory", config)
    source.rename(tmp_path / "away")
    with pytest.raises(SourceError, match="'first' is trained .* put the source back and --resume"):
        resume_run(config.outdir)
    assert not bank.exists()
    (tmp_path / "away").rename(source)
    resume_run(config.outdir)
    kept = bank_bytes(tmp_path)
    assert MemoryBank.load(bank, source_state(source)).names == ["first"]
    resume_run(config.outdir)
    assert bank_bytes(tmp_path) == kept
    with pytest.raises(UsageError, match="task 'first' with another"):
        resume_run(config.outdir, steps=3)
    assert bank_bytes(tmp_path) == kept
    with pytest.raises(UsageError, match=r"task 'first' is in the bank .* already"):
        start_run("gan-memory", dataclasses.replace(config, outdir=str(tmp_path / "other")))
    with pytest.raises(UsageError, match="cannot name a task"):
        start_run("gan-memory", dataclasses.replace(config, outdir=str(tmp_path / "other"), task="a/b"))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (["a={cats}", "a={dogs}"], UsageError, "a task of that name is a=.*cats already"),
        (["a={cats}", "A={dogs}"], UsageError, "a task of that name is a="),
        (["a/b={cats}", "c={dogs}"], UsageError, "'a/b' cannot name a task"),
        (["={cats}"], UsageError, "'' cannot name a task"),
        (["a="], UsageError, "'a=' names a task and no images"),
        (["bank={cats}"], UsageError, "cannot be called 'bank'"),
        (["a={cats}", "b={cats}-none"], DataError, "no images at"),
        (["a={cats}", "b={source}"], DataError, "no image"),
        (["a={cats}", "{dogs}"], UsageError, "each is named, as --data NAME=FOLDER"),
        (["a={cats}", "--eval-data", "{dogs}"], UsageError, "give each its own held-out images"),
        (["a={cats}", "--eval-data", "b={dogs}"], UsageError, "NAME one of a"),
        (["a={cats}", "--eval-data", "a={dogs}-none"], DataError, "no images at"),
        (["a={cats}", "--task", "b"], UsageError, "leave --task out"),
        (["a={cats}", "--classes", "2"], UsageError, "--labels folders"),
        (["a={cats}", "b={dogs}", "--source", "{cats}"], UsageError, "2 sources were given"),
    ],
)
def test_bad_tasks_are_refused_before_the_first(world, tmp_path, data, error, message) -> None:
    places = {name: str(world / name) for name in ("cats", "dogs", "source")}
    arguments = ["gan-memory", "--source", places["source"], "--outdir", str(tmp_path / "out"), *FLAGS]
    flag = "--data"
    for part in (part.format(**places) for part in data):
        arguments += [part] if part.startswith("--") or flag != "--data" else [flag, part]
        flag = part if part.startswith("--") else "--data"
    from adafm_trainer.cli.train import main

    with pytest.raises(error, match=message):
        main(arguments)
    assert not (tmp_path / "out").exists()


def test_other_commands_for_tasks(world, tmp_path, five, monkeypatch, capsys) -> None:
    out, _, _ = five
    assert cli.main(["train", "--resume", str(out), "--steps", "9"]) == 2
    assert "of which those in the bank cannot change" in capsys.readouterr().err
    assert cli.main(["train", "scratch", "--data", "a", "--data", "b", "--outdir", str(tmp_path / "x")]) == 2
    assert "`adafm train scratch` takes one set of images" in capsys.readouterr().err
    assert cli.main(["train", "gan-memory", "--outdir", "x", "--data"]) == 2
    # A folder whose name holds an equals sign is no name.
    folder = image_folder(tmp_path / "a=b")
    flags = ["--source", str(world / "source"), "--outdir", str(tmp_path / "run"), *FLAGS, "--eval-every", "-1"]
    assert cli.main(["train", "gan-memory", f"--data={folder}", *flags]) == 0
    assert (tmp_path / "run" / "config.yaml").is_file()
    data = ["--data", f"a={folder}", "--data", f"b={world / 'cats'}"]
    assert cli.main(["train", "gan-memory", *data, *flags[:3], str(tmp_path / "dry"), *FLAGS, "--dry-run"]) == 0
    assert not (tmp_path / "dry").exists()
    (tmp_path / "tasks.json").write_text("{}")
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "cannot be read as the order of tasks" in capsys.readouterr().err
    monkeypatch.setattr("adafm_trainer.trainer.tasks.launched_by_torchrun", lambda: True)
    with pytest.raises(UsageError, match="under torchrun train one after another"):
        resume_tasks(out)
