"""Low-rank storage of GAN memory's tasks: what is kept, what the next task starts from, and the rank penalty."""

import dataclasses

import pytest
import torch
from adafm_trainer.errors import SourceError, UsageError
from adafm_trainer.methods.gan_memory import GanMemory, finish_task
from adafm_trainer.models.memory import MemoryGenerator, load_source, modulated_layers
from adafm_trainer.models.memory_config import MemoryConfig
from adafm_trainer.models.memory_lowrank import (
    Components,
    LowRankConv2d,
    energy_threshold,
    low_rank_layers,
    rank_penalty,
    store,
    stored_numbers,
    stored_numbers_as_published,
)
from adafm_trainer.models.source import load_pair
from adafm_trainer.trainer.assemble import assemble
from memories import WIDE, bank_of, latents
from tiny import settings, source_folder


def tensors_of(bank, name):
    return {key: value.clone() for key, value in bank._tasks[name].items()}


def test_low_rank_tasks_share_components() -> None:
    cfg = MemoryConfig(WIDE)
    bank, trained, source = bank_of(3, cfg, "low-rank")
    layers = low_rank_layers(cfg)
    assert layers == [f"resnet_{n}_0.conv_{i}" for n in range(4) for i in (0, 1)]
    for name in bank.names:
        state, kept = bank.recall(name), bank.components(name)
        for layer in layers:
            module = trained[name].get_submodule(layer)
            assert isinstance(module, LowRankConv2d) == (name != "task0")
            for n, matrix in enumerate(("gamma", "beta")):
                whole = getattr(module, matrix).flatten(1)
                if name != "task0":
                    whole = whole + module.components(matrix).matrix()
                # With up to 128 channels every component that is not nought is kept.
                torch.testing.assert_close(state[f"{layer}.{matrix}"].flatten(1), whole, rtol=0, atol=2e-5)
                assert kept[layer][n] == min(whole.shape)
        shapes = [bank.base().get_submodule(layer).gamma.shape for layer in layers]
        sizes = [sum(2 * (o + i + 1) * min(o, i) + o for o, i, *_ in shapes)]
        sizes += [sum(2 * (2 * o + 1) * min(o, i) + o for o, i, *_ in shapes)]
        assert bank.low_rank_numbers(name) == tuple(sizes) and sizes[0] != sizes[1]
    z = latents(cfg, dtype=torch.float32)
    dense = MemoryGenerator(cfg)
    load_source(dense, source)
    dense.load_state_dict(bank.recall("task2"), strict=False)
    torch.testing.assert_close(bank.generator("task2")(z), dense(z), rtol=0, atol=1e-5)


def test_the_next_low_rank_task_starts_from_the_stored_components() -> None:
    bank, trained, _ = bank_of(2, MemoryConfig(WIDE), "low-rank")
    generator = MemoryGenerator(bank.next_model())
    bank.start(generator)
    layer, before = generator.get_submodule("resnet_1_0.conv_0"), trained["task1"].get_submodule("resnet_1_0.conv_0")
    first = trained["task0"].get_submodule("resnet_1_0.conv_0")
    assert not layer.gamma.any() and torch.equal(layer.shift, first.shift)
    kept = before.components("gamma")
    assert torch.equal(layer.gamma_s[: len(kept.s)], kept.s) and len(layer.gamma_s) > len(kept.s)
    assert torch.equal(layer.gamma_u[:, : len(kept.s)], kept.u)
    trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trains == {"gamma", "beta", "gamma_s", "beta_s", "shift"}
    narrow = dict(modulated_layers(bank.base()))["resnet_6_0.conv_1"]
    assert torch.equal(generator.get_submodule("resnet_6_0.conv_1").gamma, narrow.gamma)
    with torch.no_grad():
        layer.gamma_u.add_(0.1)
    with pytest.raises(ValueError, match=r"begin with bank\.start"):
        bank.add("more", generator)
    with pytest.raises(ValueError, match="of bank.next_model"):
        bank.add("more", trained["task1"])


# Of the sum 0.6, 0.84, 0.96, 1 are reached; the thresholds are 1, 0.95, 0.9 and 0.8.
@pytest.mark.parametrize(("rows", "expected"), [(64, 4), (256, 3), (512, 3), (1024, 2)])
def test_storing_keeps_what_the_threshold_asks_for(rows, expected) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64))[0] for n in (rows, 4))
    sigma = torch.tensor([6.0, 2.4, 1.2, 0.4], dtype=torch.float64)
    residual = (left * sigma) @ right.t()
    kept, count = store(residual[:, :, None, None], Components.empty(residual))
    assert count == expected
    torch.testing.assert_close(kept.s, sigma[:expected])
    # What is stored counts towards the sum: a residual of a tenth of it is below every threshold under 1.
    again, more = store(residual / 10, kept)
    assert torch.equal(again.s[:expected], kept.s)
    assert (more > 0) == (kept.s.sum() / (kept.s.sum() + 1) < energy_threshold(rows))


def test_storing_nothing_keeps_nothing() -> None:
    stored = Components(torch.ones(8, 1), torch.ones(1), torch.ones(3, 1))
    again, count = store(torch.zeros(8, 3), stored)
    assert count == 0 and torch.equal(again.s, stored.s)
    nothing, count = store(torch.zeros(8, 3), Components.empty(torch.zeros(8, 3)))
    assert count == 0 and nothing.matrix().shape == (8, 3) and not nothing.matrix().any()


def test_thresholds_and_sizes() -> None:
    published = {64: 1.0, 128: 1.0, 256: 0.95, 512: 0.9, 1024: 0.8, 2048: 0.8}
    assert {channels: energy_threshold(channels) for channels in published} == published
    between = [energy_threshold(channels) for channels in (1, 100, 129, 200, 255, 300, 600, 1000)]
    assert between[0] == between[1] == 1.0 and between == sorted(between, reverse=True) and 0.8 < between[-1] < 0.81
    assert energy_threshold(724) == pytest.approx(0.85, abs=1e-3)
    assert stored_numbers((512, 1024, 1, 1), 3) == 3 * 1537
    assert stored_numbers_as_published((512, 1024, 1, 1), 3) == 3 * 1025
    assert stored_numbers((64, 64), 5) == stored_numbers_as_published((64, 64), 5)


def test_low_rank_runs_of_the_method(tmp_path) -> None:
    pair = load_pair(source_folder(tmp_path / "source", WIDE))
    method = GanMemory()
    config = settings(tmp_path, storage="low-rank", bank=str(tmp_path / "bank"))
    for number in range(3):
        torch.manual_seed(0)
        model = method.target_model([pair], config)
        assert bool(model.components) == (number > 0)
        networks = method.structure(MemoryConfig.from_json(model.to_json()), config)
        method.initialise(networks, [pair], config, lambda _: None)
        assembly = assemble(method, networks, config)
        before = {name: value.clone() for name, value in networks.generator.state_dict().items()}
        result = assembly.step.generator(latents(model, 4, torch.float32))
        assert result.finite and result.images.shape == (4, 3, 64, 64)
        groups = {name for group in assembly.groups for name in group.parameters}
        changed = {n for n, t in networks.generator.state_dict().items() if not torch.equal(t, before[n])}
        assert changed <= groups and not any(name.endswith(("_u", "_v")) for name in groups)
        if number:
            assert {"resnet_0_0.conv_0.gamma", "resnet_0_0.conv_0.gamma_s"} <= changed
        line = finish_task(config.bank, f"t{number}", assembly.average.module, None, pair.average_state, "low-rank")
        assert "new components in 8 layers" in line and "as the released code counts" in line
    with pytest.raises(UsageError, match="add --storage low-rank"):
        method.target_model([pair], dataclasses.replace(config, storage="full"))
    with pytest.raises(SourceError, match="agree in all of them"):
        method.target_model([pair], dataclasses.replace(config, classes=3))


@pytest.mark.parametrize("modulation", ["plan", "autograd"])
def test_every_tenth_step_has_a_rank_penalty(tmp_path, modulation) -> None:
    pair, method = load_pair(source_folder(tmp_path / "source", WIDE)), GanMemory()

    def gradients(step, storage):
        torch.manual_seed(0)
        config = settings(tmp_path, storage=storage, modulation=modulation)
        networks = method.structure(method.target_model([pair], config), config)
        method.initialise(networks, [pair], config, lambda _: None)
        assembly = assemble(method, networks, config)
        parameter = networks.generator.get_parameter("resnet_6_0.conv_1.gamma")
        before = parameter.detach().clone().requires_grad_()
        method.before_step(networks, config, step)
        assembly.step.generator(latents(networks.model, 4, torch.float32))
        (extra,) = torch.autograd.grad(rank_penalty([before]), before)
        return parameter.grad.clone(), extra

    plain, extra = gradients(10, "full")
    torch.testing.assert_close(gradients(7, "low-rank")[0], plain)
    torch.testing.assert_close(gradients(20, "low-rank")[0], plain + extra)
    assert extra.abs().max() > 1e-3


def test_the_rank_penalty_needs_matrices() -> None:
    with pytest.raises(ValueError, match="no matrices"):
        rank_penalty([])
