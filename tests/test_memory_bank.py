"""Banks of GAN memory: recall bit for bit, tasks that do not touch each other, mixed batches, low-rank storage."""

import pytest
import torch
from adafm_trainer.errors import SourceError, UsageError
from adafm_trainer.methods.gan_memory import finish_task
from adafm_trainer.models.memory import MemoryGenerator, load_source, modulation_parameters
from adafm_trainer.models.memory_bank import MemoryBank
from adafm_trainer.models.memory_config import MemoryConfig
from adafm_trainer.models.memory_file import describe_bank
from adafm_trainer.models.memory_mixed import MixedTaskGenerator
from memories import WIDE, bank_of, latents, memory_pair, moved, source_pair
from tiny import MODEL


def tensors_of(bank, name):
    return {key: value.clone() for key, value in bank._tasks[name].items()}


def test_a_recalled_task_is_its_own_training_time_self_bit_for_bit(tmp_path) -> None:
    bank, trained, source = bank_of(3)
    bank.save(tmp_path)
    read = MemoryBank.load(tmp_path, source)
    assert read.names == bank.names == ["task0", "task1", "task2"] and "task1" in read and len(read) == 3
    z = latents(bank.model, dtype=torch.float32)
    images = {name: generator(z) for name, generator in trained.items()}
    assert not torch.equal(images["task0"], images["task1"])
    for name, generator in trained.items():
        state = generator.state_dict()
        recalled = read.recall(name)
        assert recalled.keys() == set(modulation_parameters(generator))
        assert all(torch.equal(recalled[key], state[key]) for key in recalled)
        assert torch.equal(read.generator(name)(z), images[name])


@pytest.mark.parametrize("storage", ["full", "low-rank"])
def test_a_new_task_changes_nothing_of_the_earlier_ones(tmp_path, storage) -> None:
    cfg = MemoryConfig(WIDE if storage == "low-rank" else MODEL)
    bank, _, source = bank_of(2, cfg, storage)
    bank.save(tmp_path)
    z = latents(cfg, dtype=torch.float32)
    before = {name: (tensors_of(bank, name), bank.generator(name)(z)) for name in bank.names}
    generator = MemoryGenerator(bank.next_model())
    bank.start(generator)
    line = finish_task(tmp_path, "new", moved(generator, seed=8), None, source, storage)
    read = MemoryBank.load(tmp_path, source)
    assert "task 'new' (3 of them now)" in line and f"{read.nbytes('new')['generator']:,} bytes" in line
    assert read.names == [*bank.names, "new"]
    for name, (tensors, image) in before.items():
        after = tensors_of(read, name)
        assert after.keys() == tensors.keys() and all(torch.equal(after[key], tensors[key]) for key in tensors)
        assert torch.equal(read.generator(name)(z), image)


def test_what_is_recalled_is_a_copy() -> None:
    bank, trained, _ = bank_of(1)
    bank.recall("task0")["fc.gamma"].zero_()
    moved(trained["task0"], seed=1)
    again = bank_of(1)[0]
    assert all(torch.equal(bank.recall("task0")[key], value) for key, value in again.recall("task0").items())


@pytest.mark.parametrize("storage", ["full", "low-rank"])
@pytest.mark.parametrize("classes", [0, 3], ids=["unconditional", "classes"])
def test_a_mixed_batch_equals_the_single_tasks(storage, classes) -> None:
    bank, _, _ = bank_of(3, MemoryConfig(WIDE, classes=classes), storage)
    z = latents(bank.model, 7, torch.float32)
    y = torch.tensor([0, 1, 2, 2, 1, 0, 1]) if classes else None
    tasks = ["task2", "task0", "task2", "task1", "task0", "task1", "task0"]
    mixed = MixedTaskGenerator(bank)
    images = mixed(z, tasks, y)
    for n, name in enumerate(tasks):
        single = bank.generator(name)(z[n : n + 1], None if y is None else y[n : n + 1])
        torch.testing.assert_close(images[n : n + 1], single, rtol=0, atol=1e-6)
    numbers = torch.tensor([2, 0, 2, 1, 0, 1, 0])
    assert torch.equal(mixed(z, numbers, y), images)
    assert torch.equal(
        mixed(z[:2], [1, 1], None if y is None else y[:2]), mixed(z[:2], ["task1"] * 2, y[:2] if classes else None)
    )


def test_wrong_use_of_a_mixed_batch_is_refused() -> None:
    mixed, z = MixedTaskGenerator(bank_of(2)[0]), latents(MODEL, 2, torch.float32)
    with pytest.raises(ValueError, match="3 tasks for 2 samples"):
        mixed(z, [0, 1, 1])
    with pytest.raises(ValueError, match="no task 'cats' in the bank; it has task0, task1"):
        mixed(z, ["task0", "cats"])
    with pytest.raises(ValueError, match="no task 2 "):
        mixed(z, [0, 2])
    with pytest.raises(ValueError, match="no task yet"):
        MixedTaskGenerator(bank_of(0)[0])


def test_another_source_is_refused(tmp_path) -> None:
    bank, trained, source = bank_of(1)
    bank.save(tmp_path)
    other = {name: value + 1e-3 for name, value in source.items()}
    with pytest.raises(SourceError, match="was made on another source.*--source"):
        MemoryBank.load(tmp_path, other)
    with pytest.raises(SourceError, match="was made on another source"):
        finish_task(tmp_path, "more", trained["task0"], None, other)
    generator = MemoryGenerator(bank.model)
    load_source(generator, other)
    with pytest.raises(SourceError, match="is not that of the bank's source"):
        bank.add("more", generator)
    assert bank.names == ["task0"]


def test_wrong_names_and_descriptions_are_refused(tmp_path) -> None:
    bank, trained, source = bank_of(1)
    with pytest.raises(ValueError, match="'task0' is in the bank already"):
        bank.add("task0", trained["task0"])
    with pytest.raises(ValueError, match="has no name"):
        bank.add("", trained["task0"])
    with pytest.raises(KeyError, match="no task 'task1'"):
        bank.recall("task1")
    with pytest.raises(ValueError, match="without its discriminator"):
        bank.recall("task0", "discriminator")
    with pytest.raises(ValueError, match="the bank's is"):
        bank.add("more", MemoryGenerator(MemoryConfig(MODEL, classes=2)))
    with pytest.raises(ValueError, match="full or low-rank"):
        MemoryBank(bank.model, source, "half")
    bank.save(tmp_path)
    with pytest.raises(UsageError, match="cannot take task 'task0'"):
        finish_task(tmp_path, "task0", trained["task0"], None, source)
    with pytest.raises(UsageError, match="full storage"):
        finish_task(tmp_path, "more", trained["task0"], None, source, "low-rank")


def test_a_damaged_bank_is_refused(tmp_path) -> None:
    bank, _, source = bank_of(1)
    with pytest.raises(SourceError, match=r"it has no bank\.safetensors"):
        describe_bank(tmp_path)
    path = bank.save(tmp_path)
    assert describe_bank(tmp_path)["tasks"] == [{"name": "task0", "bytes": bank.nbytes("task0")}]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SourceError, match="cannot be read as a bank"):
        MemoryBank.load(tmp_path, source)


def test_the_discriminator_is_stored_on_request(tmp_path) -> None:
    cfg = MemoryConfig(MODEL, normalise_d=True)
    generator, discriminator = memory_pair(cfg, torch.float32)
    source = source_pair(MODEL, torch.float32)[0].state_dict()
    finish_task(tmp_path, "one", generator, discriminator, source)
    bank = MemoryBank.load(tmp_path, source)
    state, found = discriminator.state_dict(), bank.recall("one", "discriminator")
    assert {"fc.weight", "fc.bias", "resnet.0.conv_0.gamma"} <= found.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert bank.nbytes("one")["discriminator"] == 4 * sum(value.numel() for value in found.values())
