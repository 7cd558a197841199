"""A network's player: the plan gives what autograd gives, in every method; only what is trained gets a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from adafm_trainer.errors import UsageError
from adafm_trainer.methods import method_by_name
from adafm_trainer.methods.player import Player
from adafm_trainer.models.dcgan import DCGANConfig
from adafm_trainer.models.source import SourcePair, load_pair
from adafm_trainer.trainer.assemble import assemble
from adafm_trainer.trainer.skips import Skips
from tiny import MODEL, settings, source_folder
from torch import nn

from adafm_kernels import inject

METHODS = {
    "adafm, source head": ("adafm", {"freeze_g": 3}),
    "adafm, new head": ("adafm", {"freeze_g": 2, "head": "new"}),
    "adafm, held first": ("adafm", {"freeze_g": 3, "adafm_start": 2}),
    "transfergan": ("transfergan", {}),
    "bsa": ("bsa", {}),
    "scratch": ("scratch", {}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load_pair(source_folder(tmp_path_factory.mktemp("player") / "source"))


def double_assembly(tmp_path, source, method_name, modulate_discriminator=False, **changes):
    """A run's pair in float64, from the same start whatever the settings of the step."""
    config = settings(tmp_path, **changes)
    method = method_by_name(method_name)
    torch.manual_seed(0)
    model = method.target_model([source], config)
    networks = method.structure(model, config)
    method.initialise(networks, [source] if method.needs_source else [], config, lambda _: None)
    if modulate_discriminator:
        inject(networks.discriminator, target_modules=["conv_0", "conv_1"])
    networks.generator.double()
    networks.discriminator.double()
    return method, config, assemble(method, networks, config)


def iterate(method, config, assembly, steps=4):
    """A few iterations on keyed inputs; the gradients of each."""
    draw = torch.Generator().manual_seed(1)
    generator, found = assembly.networks.generator, []
    for step in range(steps):
        method.before_step(assembly.networks, config, step)
        assembly.set_learning_rates(config, step)
        z = torch.randn(4, generator.z_dim, generator=draw, dtype=torch.float64)
        noise = [torch.randn(4, 1, *s, generator=draw, dtype=torch.float64) for s in generator.noise_shapes] or None
        real = torch.randn(4, MODEL.channels, MODEL.size, MODEL.size, generator=draw, dtype=torch.float64)
        g = assembly.step.generator(z, None, noise)
        gradients = {f"G.{n}": p.grad.clone() for n, p in generator.named_parameters() if p.grad is not None}
        assembly.average.update()
        d = assembly.step.discriminator(real, g.images)
        critic = assembly.networks.discriminator
        gradients |= {f"D.{n}": p.grad.clone() for n, p in critic.named_parameters() if p.grad is not None}
        found.append({"g": g.loss, "real": d.loss_real, "fake": d.loss_fake, "images": g.images, **gradients})
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("modulated_discriminator", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_plan_equals_autograd(tmp_path, source, name, modulated_discriminator):
    method_name, changes = METHODS[name]
    found = {}
    for modulation in ("plan", "autograd"):
        for micro_batch in (None, 3):
            built = double_assembly(
                tmp_path, source, method_name, modulated_discriminator, modulation=modulation, **changes
            )
            assembly = built[2]
            object.__setattr__(assembly.step.config, "micro_batch", micro_batch)
            planned = [player.plan is not None for player in (assembly.step.G, assembly.step.D)]
            assert planned == [
                modulation == "plan" and method_name in ("adafm", "bsa"),
                modulation == "plan" and modulated_discriminator,
            ]
            rows = iterate(*built)
            state = {**assembly.model_state(), **assembly.average.module.state_dict()}
            found[modulation, micro_batch] = rows, state
    rows, state = found["autograd", None]
    for other_rows, other_state in found.values():
        for one, other in zip(rows, other_rows, strict=True):
            assert_same(one, other)
        assert_same(state, other_state)


def test_held_modulation_costs_no_gradient(tmp_path, source):
    method, config, assembly = double_assembly(tmp_path, source, "adafm", freeze_g=3, adafm_start=2)
    rows = iterate(method, config, assembly, steps=3)
    has = [any(name.endswith("gamma") for name in row) for row in rows]
    assert has == [False, False, True]
    plan = assembly.step.G.plan
    method.before_step(assembly.networks, config, 0)
    assembly.step.G.begin()
    assert not any(leaf.requires_grad for leaf in plan.weights.values())


def test_the_discriminator_gets_no_gradient_in_the_generators_step(tmp_path, source):
    method, config, assembly = double_assembly(tmp_path, source, "adafm", True, freeze_g=3)
    iterate(method, config, assembly, steps=1)
    critic = assembly.step.D
    assert all(p.grad is not None for p in critic.trained())
    assembly.step.generator(torch.randn(2, MODEL.z_dim, dtype=torch.float64))
    assert all(p.grad is None and p.requires_grad for p in critic.trained())
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in critic.plan.weights.values())


def test_contiguous_does_not_go_with_a_plan(tmp_path, source):
    with pytest.raises(UsageError, match="--modulation autograd"):
        double_assembly(tmp_path, source, "adafm", freeze_g=3, layout="contiguous")
    double_assembly(tmp_path, source, "adafm", freeze_g=3, layout="contiguous", modulation="autograd")
    double_assembly(tmp_path, source, "scratch", layout="contiguous")


def player(**settings):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    return Player(network, torch.optim.Adam(network.parameters(), lr=0.1, **{"fused": True, **settings}))


def test_a_step_that_is_not_finite_leaves_everything():
    one = player()
    one.begin()
    one.backward(one.network(torch.ones(1, 3)).sum())
    assert one.step()
    before = copy.deepcopy((one.network.state_dict(), one.optimizer.state_dict()))
    one.begin()
    one.backward(one.network(torch.full((1, 3), torch.inf)).sum())
    assert not one.step()
    after = one.network.state_dict(), one.optimizer.state_dict()
    assert_same(before[0], after[0])
    for index, state in before[1]["state"].items():
        assert_same(state, after[1]["state"][index])
    one.begin()
    one.backward(one.network(torch.ones(1, 3)).sum())
    assert one.step()
    assert not torch.equal(before[0]["weight"], one.network.weight)


def test_a_step_that_is_not_finite_moves_no_buffer(tmp_path):
    model = DCGANConfig(size=16, z_dim=7, ngf=6, ndf=5)
    networks = SourcePair(model, {}, None, None, {})
    _, _, assembly = double_assembly(tmp_path, networks, "scratch")
    step, pair = assembly.step, assembly.networks
    z, real = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 3, 16, 16, dtype=torch.float64)

    def buffers():
        return [[b.clone() for b in n.buffers() if b.is_floating_point()] for n in (pair.generator, pair.discriminator)]

    def same(some, others):
        return [all(torch.equal(a, b) for a, b in zip(*both, strict=True)) for both in zip(some, others, strict=True)]

    start = buffers()
    assert all(start)
    bad = step.generator(z.index_fill(0, torch.tensor([1]), torch.nan))
    assert not bad.finite and same(buffers(), start) == [True, True]
    images = step.generator(z).images
    after = buffers()
    assert same(after, start) == [False, False]
    assert not step.discriminator(real, torch.full_like(images, torch.inf)).finite
    assert same(buffers(), after) == [True, True]
    assert step.discriminator(real, images).finite and same(buffers(), after) == [True, False]


def test_exchange_sees_every_trained_parameter():
    one, seen = player(), []
    one.exchange = lambda gradients: seen.append([g.shape for g in gradients]) or [g.mul_(2) for g in gradients]
    one.network.bias.requires_grad_(False)
    one.begin()
    one.backward(one.network(torch.ones(1, 3))[0, 0])
    one.step()
    assert seen == [[(2, 3)]] and one.network.weight.grad.tolist() == [[2.0] * 3, [0.0] * 3]
    one.network.bias.requires_grad_(True)
    one.begin()
    one.backward((one.network.weight**2).sum())
    one.step()
    assert seen[1] == [(2, 3), (2,)] and not one.network.bias.grad.any()


def test_nothing_trained_is_no_error():
    one = player()
    one.network.requires_grad_(False)
    one.begin()
    one.backward(one.network(torch.ones(1, 3)).sum())
    assert one.step() and one.network.weight.grad is None


def test_optimizers_that_cannot_serve():
    with pytest.raises(ValueError, match="not fused"):
        player(fused=False)
    network = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="1 parameters of the optimizer are not in the Linear"):
        Player(network, torch.optim.Adam([*network.parameters(), nn.Parameter(torch.ones(1))], fused=True))


def test_skips_are_counted():
    skips = Skips(torch.device("cpu"), total=5, consecutive=1)
    for finite in (False, True, False, False, True):
        skips.add(torch.tensor(finite))
    assert (skips.total(), skips.consecutive(), skips.longest()) == (8, 0, 2)
