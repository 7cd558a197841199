"""A resumed run equals an uninterrupted one bit for bit, and depends on every item of the saved state."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from adafm_trainer.errors import DataError, UsageError
from adafm_trainer.trainer.rundir import RunDirectory
from adafm_trainer.trainer.start import resume_run, start_run
from tiny import MODEL, digest, image_folder, settings, source_folder

VARIANTS = {
    "scratch": ("scratch", {}),
    "transfergan": ("transfergan", {"freeze_g": 1, "freeze_d": 1}),
    "adafm": ("adafm", {"freeze_g": 2, "freeze_d": 1}),
    "adafm-released-late": ("adafm", {"freeze_g": 2, "adafm_start": 3}),
    "adafm-new-head": ("adafm", {"freeze_g": 2, "head": "new"}),
    "adafm-bf16": ("adafm", {"freeze_g": 2, "precision": "bf16"}),
    "transfergan-fp16": ("transfergan", {"precision": "fp16"}),
}


@pytest.fixture
def world(tmp_path):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    return tmp_path


def rows(run) -> list[dict]:
    found = [json.loads(line) for line in (Path(run) / "stats.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("wall", "seconds_per_step")} for row in found]


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_uninterrupted(world, variant):
    method, changes = VARIANTS[variant]
    whole = start_run(method, settings(world, "whole", **changes))
    part = settings(world, "part", **changes)
    start_run(method, dataclasses.replace(part, steps=3))
    resume_run(part.outdir, steps=6)
    assert digest(part.outdir) == digest(whole)
    # Row 3 is the extra tick at the end of the shortened run.
    assert [r for r in rows(part.outdir) if r["step"] in (0, 2, 6)] == [
        r for r in rows(whole) if r["step"] in (0, 2, 6)
    ]


def tamper(run: Path, change) -> None:
    """Edit trainer.pt of the newest checkpoint and repair its manifest."""
    folder = sorted((run / "checkpoints").glob("step*"))[-1]
    state = torch.load(folder / "trainer.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "trainer.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "trainer.pt").read_bytes()
    manifest["files"]["trainer.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def drop_moments(name):
    def change(state):
        for entry in state[name]["state"].values():
            entry["exp_avg_sq"].zero_()

    return change


def reset_steps(name):
    def change(state):
        for entry in state[name]["state"].values():
            entry["step"].zero_()

    return change


LOST = {
    "generator-moments": drop_moments("opt_g"),
    "discriminator-moments": drop_moments("opt_d"),
    "generator-adam-steps": reset_steps("opt_g"),
    "discriminator-adam-steps": reset_steps("opt_d"),
    "average-updates": lambda state: state["average"].update(updates=0),
    "penalty-phase": lambda state: state["gan_step"].update(d_steps=state["gan_step"]["d_steps"] + 1),
    "step": lambda state: state["loop"].update(step=state["loop"]["step"] - 1),
    "statistics": lambda state: state["loop"].update(sums={}, counts={}),
}


@pytest.mark.parametrize("item", [None, *LOST])
def test_every_state_item_matters(world, item):
    """Resume from the middle of a statistics window: equal with the whole state, different without any item of it."""
    whole = start_run("adafm", settings(world, "whole", freeze_g=2, snap=3, tick=4, keep=3))
    part = world / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step00000006")
    if item is not None:
        tamper(part, LOST[item])
    resume_run(part)
    same = digest(part) == digest(whole) and rows(part) == rows(whole)
    assert same == (item is None)


def child(config_changes: dict, tmp_path: Path) -> list[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nimport torch\ntorch.set_num_threads(1)\n"
        "from tiny import settings\nfrom adafm_trainer.cli import main\n"
        "from adafm_trainer.trainer.start import start_run\nfrom adafm_trainer.errors import AdafmError\n"
        f"try:\n    start_run('adafm', settings(Path({str(tmp_path)!r}), **{config_changes!r}))\n"
        "except AdafmError as error:\n    print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    return [sys.executable, "-c", code]


def resume_command(run: Path) -> list[str]:
    code = (
        "import torch; torch.set_num_threads(1)\nfrom adafm_trainer.cli import main\n"
        f"raise SystemExit(main(['train', '--resume', {str(run)!r}]))"
    )
    return [sys.executable, "-c", code]


def wait_for(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the run did not get that far"
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_75(world, number):
    changes = {"freeze_g": 2, "name": "run", "steps": 100_000, "tick": 1000, "snap": 100_000}
    process = subprocess.Popen(child(changes, world), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: (world / "run" / "checkpoints" / "last.json").exists(), process)
    time.sleep(0.3)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75, message.decode()
    assert b"adafm train --resume" in message
    step = json.loads((world / "run" / "checkpoints" / "last.json").read_text())["step"]
    assert step > 0 and not (world / "run" / "lock").exists()


def test_a_second_signal_exits_at_once():
    """A step that never ends: the first signal only asks, the second ends the process."""
    code = (
        "import time\nfrom adafm_trainer.trainer.signals import StopRequest\n"
        "with StopRequest() as stop:\n    print('ready', flush=True)\n"
        "    while not stop.requested:\n        time.sleep(0.01)\n"
        "    print('asked', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_twenty_kills_lose_nothing(world):
    """Kill -9 at random moments: every resume finds a whole checkpoint, and the end is that of an undisturbed run."""
    changes = {"freeze_g": 2, "steps": 240, "snap": 1, "tick": 40, "keep": 2}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = start_run("adafm", settings(world, "whole", **changes))
    finally:
        torch.set_num_threads(threads)
    run, chance = world / "killed", random.Random(0)
    process = subprocess.Popen(
        child({**changes, "name": "killed"}, world), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for(lambda: (run / "checkpoints" / "last.json").exists(), process)
    kills = 0
    while kills < 20:
        time.sleep(chance.uniform(0.0, 0.15))
        assert process.poll() is None, f"the run ended after {kills} kills: {process.communicate()[1].decode()}"
        before = json.loads((run / "checkpoints" / "last.json").read_text())["step"]
        process.kill()
        process.wait()
        kills += 1
        process = subprocess.Popen(resume_command(run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        progressed = lambda before=before: (  # noqa: E731
            json.loads((run / "checkpoints" / "last.json").read_text())["step"] > before
        )
        wait_for(progressed, process)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 0, message.decode()
    assert digest(run) == digest(whole)


def test_changed_data_is_refused(world):
    config = settings(world, "run", freeze_g=2, steps=2)
    start_run("adafm", config)
    image_folder(world / "images", count=13)
    with pytest.raises(DataError, match="not those the run began with"):
        resume_run(config.outdir, steps=4)
    resume_run(config.outdir, steps=4, allow_data_change=True)
    assert rows(config.outdir)[-1]["step"] == 4


def test_misuse_is_named(world):
    config = settings(world, "run", freeze_g=2, steps=2)
    start_run("adafm", config)
    with pytest.raises(UsageError, match="already holds a run"):
        start_run("adafm", config)
    with pytest.raises(UsageError, match="lies before the checkpoint's step 2"):
        resume_run(config.outdir, steps=1)
    with pytest.raises(UsageError, match="holds no run"):
        resume_run(world / "images")


def test_a_second_process_is_refused_and_a_dead_lock_taken_over(tmp_path):
    run = RunDirectory(tmp_path)
    run.lock()
    holder = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from adafm_trainer.trainer.rundir import RunDirectory\nRunDirectory({str(tmp_path)!r}).lock()",
        ],
        capture_output=True,
        text=True,
    )
    assert "is in use by process" in holder.stderr
    run.unlock()
    (tmp_path / "lock").write_text(json.dumps({"pid": 2**22 - 3, "host": __import__("socket").gethostname()}))
    run.lock()
    run.unlock()


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    run = RunDirectory(tmp_path)
    run.samples.mkdir()
    for step in (0, 5, 10):
        run.append(run.stats, {"step": step})
        (run.samples / f"step{step:06d}.png").touch()
    with run.stats.open("a") as file:
        file.write('{"step": 15, "im')
    run.truncate_rows(5)
    assert [json.loads(line)["step"] for line in run.stats.read_text().splitlines()] == [0, 5]
    assert sorted(p.name for p in run.samples.iterdir()) == ["step000000.png", "step000005.png"]


def test_model_is_the_source_s(world):
    config = settings(world, "run", steps=1)
    start_run("transfergan", config)
    assert f'"nf": {MODEL.nf}' in (world / "run" / "config.yaml").read_text()
