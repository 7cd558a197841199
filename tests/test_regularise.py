"""Anchors of source weights: their gradients are those of the penalty written out, and F is what it says."""

from __future__ import annotations

import math

import pytest
import torch
from adafm_trainer.errors import SourceError, UsageError
from adafm_trainer.methods.player import Player
from adafm_trainer.methods.regularise import Anchor, Latents, fisher_information
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.transfer import adapter_parameters, freeze, modulate_blocks
from tiny import MODEL
from torch import nn

from adafm_kernels import ModulationPlan


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def moved(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net


def some_fisher(net, names):
    generator = torch.Generator().manual_seed(2)
    named = dict(net.named_parameters())
    return {name: torch.rand(named[name].shape, generator=generator, dtype=torch.float64) for name in names}


NAMED = ["0.weight", "2.bias"]


@pytest.mark.parametrize("weighted", [False, True], ids=["l2sp", "ewc"])
def test_gradients_and_value_are_those_of_the_penalty_written_out(weighted):
    net, x = network(), torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    fisher = some_fisher(net, NAMED) if weighted else None
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    anchor = Anchor(net, NAMED, 0.7, fisher)
    moved(net)

    named = dict(net.named_parameters())
    terms = [(named[n] - start[n]).square() * (fisher[n] if weighted else 1.0) for n in NAMED]
    penalty = 0.7 * sum(t.sum() for t in terms)
    wanted = torch.autograd.grad(net(x).square().mean() + penalty, list(named.values()))

    net(x).square().mean().backward()
    anchor.add_gradients()
    for p, want in zip(named.values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(anchor.value(), penalty.detach(), rtol=1e-12, atol=0)
    assert float(anchor.value()) > 0 and not anchor.value().requires_grad


def test_at_the_start_values_there_is_no_pull():
    net = network()
    anchor = Anchor(net, NAMED, 3.0)
    anchor.add_gradients()
    named = dict(net.named_parameters())
    assert not any(named[n].grad.any() for n in NAMED) and named["0.bias"].grad is None
    assert float(anchor.value()) == 0


def test_a_parameter_at_rest_is_passed_over():
    net = network()
    anchor = Anchor(net, NAMED, 1.0)
    moved(net)
    net[0].weight.requires_grad_(False)
    anchor.add_gradients()
    assert net[0].weight.grad is None and net[2].bias.grad.abs().sum() > 0


def test_value_of_half_precision_weights_is_summed_in_float32():
    net = network(torch.bfloat16)
    anchor = Anchor(net, ["0.weight"], 1.0)
    with torch.no_grad():
        net[0].weight += 1
    assert anchor.value().dtype == torch.float32


def test_the_state_restores_the_anchor(tmp_path):
    net = network()
    fisher = some_fisher(net, NAMED)
    anchor = Anchor(net, NAMED, 0.5, fisher)
    torch.save(anchor.state_dict(), tmp_path / "anchor.pt")
    moved(net)
    # A resumed run builds its networks with other values and loads the trained ones.
    again = moved(network(), seed=9)
    ones = {name: torch.ones_like(value) for name, value in fisher.items()}
    resumed = Anchor(again, NAMED, 0.5, ones)
    resumed.load_state_dict(torch.load(tmp_path / "anchor.pt", weights_only=True))
    again.load_state_dict(net.state_dict())
    for each, held in ((anchor, net), (resumed, again)):
        each.add_gradients()
        assert held[0].weight.grad.any()
    assert torch.equal(anchor.value(), resumed.value())
    assert all(torch.equal(net.get_parameter(n).grad, again.get_parameter(n).grad) for n in NAMED)


def test_saved_values_do_not_follow_the_network():
    net = network()
    anchor = Anchor(net, NAMED, 0.5)
    state = anchor.state_dict()
    before = {name: value.clone() for name, value in state["start"].items()}
    moved(net)
    assert all(torch.equal(before[n], state["start"][n]) for n in NAMED)
    assert all(torch.equal(before[n], anchor.state_dict()["start"][n]) for n in NAMED)


def test_it_holds_in_a_network_with_a_plan():
    z = torch.randn(4, MODEL.z_dim, generator=torch.Generator().manual_seed(0))
    gradients = []
    for planned in (False, True):
        torch.manual_seed(0)
        generator = build_generator(MODEL)
        modulate_blocks(generator, MODEL, 2)
        frozen = freeze(generator, MODEL, 2)
        adapters = adapter_parameters(generator)
        for name in adapters:
            generator.get_parameter(name).requires_grad_(True)
        trained = {name: p for name, p in generator.named_parameters() if p.requires_grad}
        anchored = [name for name in trained if name not in adapters]
        assert frozen and adapters and anchored
        anchor = Anchor(generator, anchored, 0.3)
        moved(generator)
        optimizer = torch.optim.Adam(trained.values(), fused=True)
        player = Player(generator, optimizer, ModulationPlan(generator).attach() if planned else None)
        player.begin()
        player.backward(generator(z).square().mean())
        if planned:
            player.plan.reduce()
        anchor.add_gradients()
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


class Linear(nn.Module):
    """G(z) = Wz + b, as an image of one row."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.25], [0.0, 1.5]], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.norm = nn.Dropout(0.5)

    def forward(self, z, y=None, noise=None):
        out = self.norm(z @ self.w.T + self.b)
        if y is not None:
            out = out * y.unsqueeze(1)
        return out if noise is None else out + noise[0]


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.tensor([1.0, -0.5, 0.75], dtype=torch.float64))

    def forward(self, x, y=None):
        return x @ self.v


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "labels-and-noise"])
def test_fisher_information_of_a_linear_model_by_hand(extra):
    g, d = Linear(), Judge()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 2, dtype=torch.float64, generator=generator)
    y = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0]).double() if extra else None
    noise = [torch.randn(7, 3, dtype=torch.float64, generator=generator)] if extra else None
    batches = [Latents(z[p], None if y is None else y[p], noise and [noise[0][p]]) for p in (slice(0, 4), slice(4, 7))]
    found = fisher_information(g, d, batches, ["w", "b", "unused"])

    w, b, v = g.w.detach(), g.b.detach(), d.v.detach()
    want_w, want_b = torch.zeros_like(w), torch.zeros_like(b)
    for i in range(7):
        scale = 1.0 if y is None else float(y[i])
        logit = float(v @ ((w @ z[i] + b) * scale + (0 if noise is None else noise[0][i])))
        # d log sigma(a) / da = sigma(-a), and da/dw_jk = v_j z_k.
        slope = scale / (1 + math.exp(logit))
        want_w += (slope * torch.outer(v, z[i])) ** 2 / 7
        want_b += (slope * v) ** 2 / 7
    torch.testing.assert_close(found["w"], want_w, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["b"], want_b, rtol=1e-12, atol=0)
    assert not found["unused"].any()
    # Evaluation mode inside (or dropout would show), everything as before outside.
    assert g.training and g.norm.training and g.w.grad is None and d.v.grad is None and d.v.requires_grad


def test_fisher_information_takes_frozen_parameters_and_leaves_them_frozen():
    g, d = Linear(), Judge()
    z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = fisher_information(g, d, [z], ["w"])["w"]
    g.requires_grad_(False)
    with torch.no_grad():
        found = fisher_information(g, d, [z[:1], z[1:]], ["w"])["w"]
    assert torch.equal(found, want) and want.any() and not g.w.requires_grad


def test_fisher_information_of_a_source_anchors_it():
    torch.manual_seed(0)
    g, d = build_generator(MODEL), build_discriminator(MODEL)
    names = [name for name, _ in g.named_parameters()]
    fisher = fisher_information(g, d, [torch.randn(3, MODEL.z_dim)], names)
    assert list(fisher) == names and sum(bool(f.any()) for f in fisher.values()) > len(names) // 2
    anchor = Anchor(g, names, 1e3, fisher)
    moved(g)
    anchor.add_gradients()
    assert float(anchor.value()) > 0 and all(p.grad is not None for p in g.parameters())


def test_errors():
    net = network()
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="--reg-weight is"):
            Anchor(net, NAMED, weight)
    with pytest.raises(
        UsageError, match="no trained parameter of the Sequential comes from the source; take --reg none"
    ):
        Anchor(net, [], 1.0)
    with pytest.raises(ValueError, match="not parameters of the Sequential: 7.weight"):
        Anchor(net, ["0.weight", "7.weight"], 1.0)
    with pytest.raises(ValueError, match="named twice: 0.weight"):
        Anchor(net, ["0.weight", "0.weight"], 1.0)
    fisher = some_fisher(net, NAMED)
    with pytest.raises(ValueError, match="differ in 2.bias"):
        Anchor(net, ["0.weight"], 1.0, fisher)
    with pytest.raises(ValueError, match=r"of 2.bias is \[3\]; the parameter is \[2\]"):
        Anchor(net, NAMED, 1.0, {**fisher, "2.bias": torch.zeros(3)})
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="of 2.bias must be finite and not negative"):
            Anchor(net, NAMED, 1.0, {**fisher, "2.bias": torch.tensor([0.0, bad])})
    plain, weighted = Anchor(net, NAMED, 1.0), Anchor(net, NAMED, 1.0, fisher)
    with pytest.raises(ValueError, match="one of --reg ewc, this run's of --reg l2sp"):
        plain.load_state_dict(weighted.state_dict())
    with pytest.raises(ValueError, match="one of --reg l2sp, this run's of --reg ewc"):
        weighted.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="saved start values and the anchored parameters differ in 2.bias"):
        plain.load_state_dict(Anchor(net, ["0.weight"], 1.0).state_dict())


def test_errors_of_fisher_information():
    g, d, z = Linear(), Judge(), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one sample"):
        fisher_information(g, d, [], ["w"])
    with pytest.raises(ValueError, match="none of the 1 named parameters has a part"):
        fisher_information(g, d, [z], ["unused"])
    with pytest.raises(ValueError, match="not parameters of the Linear: x"):
        fisher_information(g, d, [z], ["x"])
    with pytest.raises(SourceError, match="not finite in w"):
        fisher_information(g, d, [z * math.nan], ["w"])
