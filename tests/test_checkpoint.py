"""Checkpoints: whole or absent, whatever happens while they are written or afterwards."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from adafm_trainer.errors import DiskError, UsageError
from adafm_trainer.trainer import checkpoint as module
from adafm_trainer.trainer.checkpoint import load_checkpoint, save_checkpoint, write_atomic


def save(folder, step, value, keep=3):
    model = {"generator.w": torch.full((4, 3), float(value)), "discriminator.w": torch.ones(2)}
    return save_checkpoint(folder, step, model, {"w": torch.full((4, 3), value + 0.5)}, {"loop": {"step": step}}, keep)


def test_round_trip_keeps_every_bit(tmp_path):
    torch.manual_seed(0)
    model = {"generator.w": torch.randn(5, 3, 3, 3).contiguous(memory_format=torch.channels_last)}
    state = {"opt": {"step": torch.tensor(3.0), "exp_avg": torch.randn(7)}, "loop": {"step": 9, "warned": ["a"]}}
    save_checkpoint(tmp_path, 9, model, {"w": torch.randn(2)}, state, keep=1)
    path, loaded, _, trainer = load_checkpoint(tmp_path)
    assert path.name == "step00000009"
    assert torch.equal(loaded["generator.w"], model["generator.w"])
    assert torch.equal(trainer["opt"]["exp_avg"], state["opt"]["exp_avg"]) and trainer["loop"] == state["loop"]


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step*")) == ["step00000003", "step00000004"]
    assert json.loads((tmp_path / "last.json").read_text())["step"] == 4


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "trainer.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, name, damage):
    save(tmp_path, 1, 1.0)
    file = save(tmp_path, 2, 2.0) / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])
    warnings = []
    _, model, _, trainer = load_checkpoint(tmp_path, warnings.append)
    assert trainer["loop"]["step"] == 1 and model["generator.w"][0, 0] == 1.0
    assert len(warnings) == 1 and "step00000002" in warnings[0]


def test_no_whole_checkpoint_is_an_error(tmp_path):
    (save(tmp_path, 1, 1.0) / "trainer.pt").unlink()
    with pytest.raises(UsageError, match=r"no whole checkpoint.*trainer.pt is missing"):
        load_checkpoint(tmp_path, lambda _: None)


def test_a_kill_between_the_renames_is_whole(tmp_path):
    save(tmp_path, 1, 1.0)
    pointer = (tmp_path / "last.json").read_text()
    save(tmp_path, 2, 2.0)
    (tmp_path / "last.json").write_text(pointer)
    assert load_checkpoint(tmp_path)[3]["loop"]["step"] == 2


def test_left_over_temporary_is_swept(tmp_path):
    save(tmp_path, 1, 1.0)
    (tmp_path / ".writing-step00000002").mkdir()
    load_checkpoint(tmp_path)
    assert not (tmp_path / ".writing-step00000002").exists()


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 6])
def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, failing):
    save(tmp_path, 1, 1.0, keep=1)
    calls = {"n": 0}
    sync = module._sync

    def full(path):
        calls["n"] += 1
        if calls["n"] == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(module, "_sync", full)
    with pytest.raises(DiskError, match="the disk is full"):
        save(tmp_path, 2, 2.0, keep=1)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)[3]["loop"]["step"] in (1, 2)
    assert not list(tmp_path.glob(".writing-*"))


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
