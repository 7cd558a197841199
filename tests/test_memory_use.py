"""Using a bank of GAN memory: its sizes and pictures from the command line, and replay for a classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adafm_trainer import cli, keyed
from adafm_trainer.data.grid import to_uint8
from adafm_trainer.examples import replay_classifier
from adafm_trainer.models.memory import MemoryGenerator, modulated_layers, modulation_parameters
from adafm_trainer.models.memory_bank import MemoryBank
from adafm_trainer.models.memory_config import MemoryConfig
from adafm_trainer.models.source import load_pair
from adafm_trainer.trainer.bank import _in_low_rank, draw_tasks, open_bank, task_sizes
from adafm_trainer.trainer.sampling import generate
from memories import WIDE, moved
from PIL import Image
from tiny import MODEL, image_folder, source_folder

NAMES = ("one", "two", "three")


def made_bank(folder, model=MODEL, storage="full", classes=0):
    """A bank with tasks that differ visibly, in ``folder`` with its source."""
    source = load_pair(source_folder(folder / "source", model)).average_state
    bank = MemoryBank(MemoryConfig(model, classes=classes), source, storage)
    for number, name in enumerate(NAMES):
        generator = MemoryGenerator(bank.next_model())
        bank.start(generator)
        moved(generator, seed=number)
        *_, (_, last) = modulated_layers(generator)
        with torch.no_grad():
            last.shift += torch.randn(last.shift.shape, generator=torch.Generator().manual_seed(number))
        bank.add(name, generator)
    bank.save(folder / "bank")
    return open_bank(folder / "bank", str(folder / "source"))


def test_the_command_lists_and_draws(tmp_path, capsys) -> None:
    opened, source = made_bank(tmp_path), str(tmp_path / "source")
    arguments = ["bank", str(tmp_path / "bank"), "--source", source]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert any(
            line.split()[:2] == [name, f"{opened.bank.nbytes(name)['generator']:,}"] for line in printed.split("\n")
        )
    pictures = {}
    for way in ([], ["--single"]):
        out = tmp_path / f"grid{len(way)}.png"
        flags = ["--out", str(out), "--tasks", "three, one", "--columns", "5", "--seed", "3", *way]
        assert cli.main([*arguments, *flags]) == 0
        pictures[len(way)] = np.asarray(Image.open(out)).astype(int)
    assert pictures[0].shape == (2 * MODEL.size, 5 * MODEL.size, 3)
    # A value at the edge of two of the 256 levels may fall to either side.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0][: MODEL.size] - pictures[0][MODEL.size :]).max() > 1
    for flags, message in (
        (["--tasks", "four"], "no task 'four' in the bank; it has one, two, three"),
        (["--tasks", "one,one"], "name at least one, and each once"),
        (["--columns", "0"], "0 samples of each task"),
    ):
        assert cli.main([*arguments, "--out", str(tmp_path / "none.png"), *flags]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "none.png").exists()
    assert cli.main([*arguments, "--source-weights", "raw"]) == 4
    assert "was made on another source" in capsys.readouterr().err


@pytest.mark.parametrize("storage", ["full", "low-rank"])
@pytest.mark.parametrize("classes", [0, 2])
def test_mixed_pictures_equal_those_of_the_single_tasks(tmp_path, storage, classes) -> None:
    bank = made_bank(tmp_path, WIDE, storage, classes).bank
    images = draw_tasks(bank, NAMES, 3, seed=5)
    torch.testing.assert_close(images, draw_tasks(bank, NAMES, 3, seed=5, single=True), rtol=0, atol=1e-6)
    assert not torch.equal(images, draw_tasks(bank, NAMES, 3, seed=6))
    one = bank.generator("two")
    one.sample_classes = classes
    torch.testing.assert_close(images[3:6], generate(one, 5, "sample", range(3)), rtol=0, atol=1e-6)


def test_sizes_in_both_storages(tmp_path) -> None:
    full, low = made_bank(tmp_path / "a", WIDE), made_bank(tmp_path / "b", WIDE, "low-rank")
    for size in task_sizes(full):
        assert size.full == full.bank.nbytes(size.name)["generator"]
    for size in task_sizes(low):
        state = low.bank.base().state_dict()
        assert size.full == 4 * sum(state[key].numel() for key in modulation_parameters(low.bank.base()))
        assert size.low_rank == low.bank.nbytes(size.name)["generator"]
    # The estimate stores the very tasks: layers this narrow keep every component, so nothing is lost.
    again = _in_low_rank(full.bank, full.source)
    for name, size in zip(NAMES, task_sizes(full), strict=True):
        assert size.low_rank == again.nbytes(name)["generator"] > 0
        for key, value in full.bank.recall(name).items():
            torch.testing.assert_close(again.recall(name)[key], value, rtol=0, atol=2e-5)


def test_replay_remembers_what_is_forgotten_without_it(tmp_path) -> None:
    """The real images are the bank's own, so that replay can be perfect: what is tested is the learning."""
    opened = made_bank(tmp_path)
    folders = []
    for name in NAMES:
        images = generate(opened.bank.generator(name), 7, "real", range(25))
        (tmp_path / name).mkdir()
        for index, picture in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(picture).save(tmp_path / name / f"{index:03d}.png")
        folders.append((name, str(tmp_path / name)))
    lines: list[str] = []
    found = replay_classifier.compare(opened, folders, steps=40, batch=8, say=lines.append)
    last = {way: rows[-1] for way, rows in found.items()}
    assert len(lines) == 1 + 2 * len(NAMES) and lines[-1].startswith("after three, no replay")
    assert last["no replay"] == [0, 0, 1], "without replay only the last task is known"
    assert sum(last["replay"]) / 3 > 0.75, lines
    assert found["replay"][0] == found["no replay"][0], "the first task has nothing to replay"
    again, other = (replay_classifier.compare(opened, folders, steps=2, batch=3, say=lines.append) for _ in range(2))
    assert again == other


def test_replayed_images_are_those_of_their_labels(tmp_path) -> None:
    opened = made_bank(tmp_path, classes=2)
    draw = replay_classifier.replay_of(opened, NAMES[:2], 6, seed=1)
    images, labels = draw(3)
    assert images.shape[0] == 12 and set(labels[:6].tolist()) == {0, 1} and torch.equal(labels[:6] + 2, labels[6:])
    z = keyed.normal(1, "replay/z", 3, range(6), (MODEL.z_dim,))
    for number, name in enumerate(NAMES[:2]):
        single = (opened.bank.generator(name)(z, labels[:6]) / opened.data_scale).clamp(-1, 1)
        torch.testing.assert_close(images[6 * number :][:6], single, rtol=0, atol=1e-6)
    assert not torch.equal(draw(3)[0], draw(4)[0])
    for label in ("a", "b"):
        image_folder(tmp_path / "real" / label, 5)
    split = replay_classifier.load_task(opened, 1, "two", str(tmp_path / "real"), seed=0)
    assert len(split.labels) == 8 and len(split.heldout_labels) == 2
    assert set(torch.cat([split.labels, split.heldout_labels]).tolist()) == {2, 3}


def test_replay_s_command_and_its_mistakes(tmp_path, capsys) -> None:
    made_bank(tmp_path)
    data = [f"{name}={image_folder(tmp_path / name, 5, seed=k)}" for k, name in enumerate(NAMES)]
    flags = ["--bank", str(tmp_path / "bank"), "--source", str(tmp_path / "source"), "--steps", "1", "--batch", "2"]

    def run(*chosen):
        return replay_classifier.main([*flags, *(part for value in chosen for part in ("--data", value))])

    assert run(*data) == 0 and "after three, replay" in capsys.readouterr().out
    few = image_folder(tmp_path / "few", 2)
    for chosen, code, message in (
        (data[:1], 2, "two tasks or more"),
        ([data[0], data[0]], 2, "each once"),
        ([data[0], f"four={tmp_path / 'one'}"], 2, "the bank has one, two, three"),
        ([data[0], f"two={few}"], 3, "at least 3"),
        ([data[0], "two"], 2, "--data two: give TASK=FOLDER"),
        ([data[0], "two=nowhere"], 3, "no images at 'nowhere'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*chosen)
        assert stopped.value.code == code and message in capsys.readouterr().err
