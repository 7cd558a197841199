"""Runs of the method gan-memory: exact resume, one task after another into a bank, labels."""

import dataclasses
import json

import pytest
import torch
from adafm_trainer.errors import Interrupted, SourceError, UsageError
from adafm_trainer.methods.gan_memory import finish_task
from adafm_trainer.models.memory_bank import MemoryBank
from adafm_trainer.models.source import load_pair
from adafm_trainer.trainer.load import load_run
from adafm_trainer.trainer.start import resume_run, start_run
from memories import WIDE, latents
from stopping import stop_after
from tiny import digest, image_folder, settings, source_folder

METHOD = "gan-memory"
LABELLED = {"classes": 2, "labels": "folders"}


def run_task(tmp_path, number, **changes):
    """One run on images of its own; its folder."""
    data = str(tmp_path / f"images{number}")
    return start_run(METHOD, settings(tmp_path, f"run{number}", data=data, steps=2, **changes))


@pytest.fixture
def world(tmp_path):
    image_folder(tmp_path / "images")
    for label in ("one", "two"):
        image_folder(tmp_path / "labelled" / label, seed=len(label))
    for number in range(2):
        image_folder(tmp_path / f"images{number}", seed=number)
    source_folder(tmp_path / "source")
    return tmp_path


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, LABELLED, {"faithful": True, **LABELLED}])
def test_resumed_equals_uninterrupted(world, changes) -> None:
    if "labels" in changes:
        changes = {**changes, "data": str(world / "labelled")}
    whole = start_run(METHOD, settings(world, "whole", steps=4, **changes))
    part = settings(world, "part", steps=4, **changes)
    start_run(METHOD, dataclasses.replace(part, steps=3))
    resume_run(part.outdir, steps=4)
    assert digest(part.outdir) == digest(whole)


def test_runs_one_after_another_fill_a_bank(world) -> None:
    source = load_pair(world / "source").average_state
    folder = world / "bank"
    for number in range(2):
        trained = load_run(run_task(world, number), "cpu").generator
        line = finish_task(folder, f"images{number}", trained, None, source)
        assert f"({number + 1} of them now)" in line
        # What is recalled computes what the run's generator computes, bit for bit.
        z = latents(trained.memory, dtype=torch.float32)
        recalled = MemoryBank.load(folder, source).generator(f"images{number}")
        assert torch.equal(recalled(z), trained(z))
    first, second = (MemoryBank.load(folder, source).recall(f"images{n}") for n in range(2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    rows = json.loads((world / "run1" / "blocks.json").read_text())
    states = {(row["network"], row["group"]): row["state"] for row in rows}
    assert states["G", "resnet.0"] == states["D", "resnet.0"] == states["G", "fc"] == "adapter"
    assert (states["D", "fc"], states["D", "conv_img"]) == ("trained", "frozen")


def test_low_rank_runs_start_from_the_bank_and_resume(world, monkeypatch) -> None:
    source_folder(world / "source", WIDE)
    source = load_pair(world / "source").average_state
    low = {"storage": "low-rank", "bank": str(world / "bank"), "steps": 3}
    for number in range(2):
        data = str(world / f"images{number}")
        part = settings(world, f"part{number}", data=data, **low)
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            stop_after(patch, 2)
            start_run(METHOD, part)
        whole = settings(world, f"whole{number}", data=data, **low)
        start_run(METHOD, whole)
        # The whole run has put the task into the bank, which the resumed one finds there.
        resume_run(part.outdir)
        assert digest(part.outdir) == digest(whole.outdir)
        assert "is there already" in (world / f"part{number}" / "log.txt").read_text()
        trained = load_run(whole.outdir, "cpu").generator
        assert bool(trained.memory.components) == bool(number)
    bank = MemoryBank.load(world / "bank", source)
    z = latents(trained.memory, dtype=torch.float32)
    # Every component of these narrow layers is kept, so the last task is what it was, to rounding.
    torch.testing.assert_close(bank.generator("images1")(z), trained(z), rtol=0, atol=1e-5)


def test_a_bank_of_another_source_is_refused_before_the_first_step(world) -> None:
    source = load_pair(world / "source")
    trained = load_run(run_task(world, 0), "cpu").generator
    finish_task(world / "bank", "one", trained, None, source.average_state)
    with pytest.raises(SourceError, match="was made on another source"):
        run_task(world, 1, bank=str(world / "bank"), source_weights="raw")
    assert not list((world / "run1").glob("checkpoints/*"))
    with pytest.raises(UsageError, match="add --storage full"):
        run_task(world, 1, bank=str(world / "bank"), storage="low-rank")


def test_wrong_settings_are_refused(world) -> None:
    with pytest.raises(UsageError, match="--labels folders"):
        start_run(METHOD, settings(world, classes=2))
    with pytest.raises(UsageError, match="--graphs on"):
        start_run(METHOD, settings(world, storage="low-rank", graphs="on"))
    with pytest.raises(SourceError, match="--freeze-g 9"):
        start_run(METHOD, settings(world, freeze_g=9))
