"""Mining several generators: winners, their probability, and the generator that is made of them."""

from __future__ import annotations

import pytest
import torch
from adafm_trainer.errors import SourceError
from adafm_trainer.methods.losses import ADVERSARIAL
from adafm_trainer.methods.player import Player
from adafm_trainer.models import gpgan, mnist, wgan_resnet
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.multi_mine import MultiMinedGenerator, SelectingMiner
from adafm_trainer.models.selecting import (
    drawn,
    of_winner,
    selector_loss,
    updated_probability,
    winner_by_batch,
    winner_by_sample,
    winner_frequency,
)
from adafm_trainer.models.wgan_config import WganResNetConfig
from torch import Tensor, nn

U_DIM = 2


def generators() -> list[nn.Module]:
    """Of two families and three latent sizes; all make images of 3 x 16 x 16."""
    torch.manual_seed(0)
    return [
        wgan_resnet.Generator(WganResNetConfig(size=16, dim=2, z_dim=5, statistics="running")).eval(),
        gpgan.build_generator(ModelConfig("resnet", 16, nf=2, nf_max=4, z_dim=3)),
        gpgan.build_generator(ModelConfig("resnet", 16, nf=4, nf_max=4, z_dim=4)),
    ]


def several(**changes) -> MultiMinedGenerator:
    made = generators()
    return MultiMinedGenerator(made, [nn.Linear(U_DIM, g.z_dim) for g in made], U_DIM, **changes)


def shared(**changes) -> MultiMinedGenerator:
    torch.manual_seed(0)
    made = [mnist.Generator(mnist.MnistConfig(dim=2, z_dim=6)) for _ in range(4)]
    return MultiMinedGenerator(made, SelectingMiner(U_DIM, 6, 4, hidden=8), U_DIM, selector="head", **changes)


def brightness(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x.mean((1, 2, 3))


def test_the_highest_score_wins_and_the_first_of_equals() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-1.0, -2.0, 0.0]])
    assert winner_by_sample(scores).tolist() == [1, 0, 2]
    assert winner_by_batch(scores).tolist() == [2, 2, 2]
    assert winner_by_batch(scores.flip(1)).tolist() == [0, 0, 0]
    assert winner_by_batch(torch.tensor([[0.0, 4.0, 1.0], [5.0, 1.0, 4.0]])).tolist() == [0, 0]
    for select in (winner_by_sample, winner_by_batch):
        with pytest.raises(ValueError, match=r"scores have shape \(3,\); expected \[B, N\]"):
            select(scores[0])
        with pytest.raises(ValueError, match=r"\(3, 0\)"):
            select(scores[:, :0])


def test_losers_have_no_gradient() -> None:
    scores = torch.randn(5, 3, requires_grad=True)
    winner = winner_by_sample(scores)
    ADVERSARIAL["wgan-gp"].generator(of_winner(scores, winner)).backward()
    expected = torch.zeros(5, 3)
    expected[torch.arange(5), winner] = -0.2
    torch.testing.assert_close(scores.grad, expected)


def test_p_goes_to_the_winners_and_stays_a_distribution() -> None:
    winner = torch.tensor([2, 2, 0, 2])
    assert winner_frequency(winner, 4).tolist() == [0.25, 0, 0.75, 0]
    p = torch.full((4,), 0.25, dtype=torch.float64)
    once = updated_probability(p, winner_frequency(winner, 4), 0.1)
    torch.testing.assert_close(once, torch.tensor([0.25, 0.225, 0.3, 0.225], dtype=torch.float64))
    for _ in range(60):
        p = updated_probability(p, winner_frequency(torch.tensor([2, 2]), 4), 0.05)
        assert (p > 0).all() and abs(p.sum().item() - 1) < 1e-12
    assert p[2] > 0.8


def test_generators_are_drawn_by_p() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    index = drawn(p, torch.randn(20_000))
    shares = winner_frequency(index, 4)
    torch.testing.assert_close(shares, p, atol=0.015, rtol=0)
    assert shares[1] == 0
    assert drawn(p, torch.tensor([-40.0, 40.0])).tolist() == [0, 3]
    # Phi(-40) is 0: not even then is a generator of probability 0 drawn.
    assert drawn(p[[1, 2, 3]], torch.tensor([-40.0])).tolist() == [1]


@pytest.mark.parametrize("index", [[0, 1, 2, 0, 2], [1, 1, 1, 1, 1], [2, 0, 0, 0, 1]])
def test_each_sample_comes_from_its_generator(index: list[int]) -> None:
    made, z = several(), torch.randn(5, U_DIM + 1)
    made.fine_tune()
    made.eval()
    images = made.pre_tanh(z, index=torch.tensor(index))
    for i, k in enumerate(index):
        alone = made.generators[k].pre_tanh(made.miners[k](z[i : i + 1, :U_DIM]))
        torch.testing.assert_close(images[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    images.sum().backward()
    for k in range(3):
        parameters = [*made.generators[k].parameters(), *made.miners[k].parameters()]
        assert all((p.grad is not None) == (k in index) for p in parameters)


@pytest.mark.parametrize("reduce", ["sample_max", "batch_max"])
def test_select_asks_the_critic(reduce: str) -> None:
    made, z = several(reduce=reduce), torch.randn(16, U_DIM + 1)
    scores = torch.stack([brightness(g(m(z[:, :U_DIM]))) for g, m in zip(made.generators, made.miners, strict=True)], 1)
    expected = winner_by_sample(scores) if reduce == "sample_max" else winner_by_batch(scores)
    found = made.select(z, brightness)
    assert torch.equal(found, expected) and not found.requires_grad
    assert len(set(expected.tolist())) == (1 if reduce == "batch_max" else len(set(scores.argmax(1).tolist())))
    # The images that are made of the winners score as high as the winners did.
    torch.testing.assert_close(brightness(torch.tanh(made.pre_tanh(z, index=found))), of_winner(scores, expected))


def test_select_leaves_every_buffer_alone() -> None:
    made = several()
    made.fine_tune()
    before = {name: value.clone() for name, value in made.named_buffers()}
    assert any("running_mean" in name for name in before)
    made.select(torch.randn(4, U_DIM + 1), brightness)
    assert all(torch.equal(value, before[name]) for name, value in made.named_buffers())
    made.pre_tanh(torch.randn(4, U_DIM + 1), index=torch.zeros(4, dtype=torch.int64))
    assert not all(torch.equal(value, before[name]) for name, value in made.named_buffers())


def test_without_a_critic_p_or_the_selector_chooses() -> None:
    made, z = several(), torch.randn(64, U_DIM + 1)
    assert torch.equal(made.index(z), made.uniform(z)) and set(made.uniform(z).tolist()) == {0, 1, 2}
    made.p.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert set(made.index(z).tolist()) == {1} and set(made.uniform(z).tolist()) == {0, 1, 2}
    torch.testing.assert_close(made(z), made.generators[1](made.miners[1](z[:, :U_DIM])))
    with pytest.raises(ValueError, match="selector is 'p': there is no head"):
        made.selector_logits(z)
    headed = shared()
    assert torch.equal(headed.index(z), headed.selector_logits(z).argmax(1))
    assert torch.equal(headed.index(z), headed.index(z + torch.tensor([0.0, 0.0, 5.0])))


def test_the_selector_learns_who_wins() -> None:
    made = shared()
    optimizer = torch.optim.Adam(made.miners[0].selector.parameters(), lr=0.1)
    torch.manual_seed(1)
    z = torch.randn(64, U_DIM + 1)
    winner = (z[:, 0] > 0).long() * 3
    for _ in range(100):
        optimizer.zero_grad()
        selector_loss(made.selector_logits(z), winner).backward()
        optimizer.step()
    assert (made.index(z) == winner).float().mean() > 0.9


def test_p_follows_the_critic_and_is_saved() -> None:
    made, z = several(reduce="batch_max", rho=0.1), torch.randn(8, U_DIM + 1)
    for _ in range(30):
        made.record(made.frequency(made.select(z, brightness)))
    favourite = made.select(z, brightness)[0]
    assert made.p[favourite] > 0.8 and abs(made.p.sum() - 1) < 1e-12
    assert torch.equal(made.state_dict()["p"], made.p)


def test_a_step_changes_the_winners_only() -> None:
    made, z = several(), torch.randn(6, U_DIM + 1)
    player = Player(made, torch.optim.Adam(made.parameters(), lr=0.01, fused=True))
    before = {name: value.detach().clone() for name, value in made.named_parameters()}
    player.begin()
    images = made.pre_tanh(z, index=torch.tensor([0, 2, 0, 2, 2, 0]))
    player.backward(-brightness(images).mean())
    assert player.step()
    changed = {name.split(".")[1] for name, value in made.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"0", "2"}


def test_a_mined_embedding_takes_the_label_s_place() -> None:
    torch.manual_seed(0)
    generator = gpgan.build_generator(ModelConfig("resnet", 16, nf=2, nf_max=4, z_dim=3, embed=2, nlabels=4))

    class Both(nn.Module):
        def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
            return u[:, :3], u[:, 3:]

    z = torch.randn(2, 6)
    made = MultiMinedGenerator([generator], Both(), 5)
    torch.testing.assert_close(made(z), generator(z[:, :3], z[:, 3:5]))


def test_checkpointing_is_passed_on() -> None:
    made = several()
    assert made.checkpoint_activations is False
    made.checkpoint_activations = True
    assert all(g.checkpoint_activations for g in made.generators) and made.checkpoint_activations


def test_generators_that_do_not_fit_together() -> None:
    one, two = generators()[0], mnist.Generator(mnist.MnistConfig(dim=2, z_dim=5))
    with pytest.raises(SourceError, match=r"generator 1 makes images of \[1, 28, 28\], generator 0 of \[3, 16, 16\]"):
        MultiMinedGenerator([one, two], nn.Linear(U_DIM, 5), U_DIM)
    two.noise_shapes = ((4, 4),)
    with pytest.raises(SourceError, match="generator 1 injects noise maps"):
        MultiMinedGenerator([one, two], nn.Linear(U_DIM, 5), U_DIM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generators": []}, "there are no generators"),
        ({"miners": [nn.Linear(2, 5)] * 2}, "2 miners for 1 generators"),
        ({"reduce": "mean"}, "reduce is 'mean'; expected one of sample_max, batch_max"),
        ({"selector": "q"}, "selector is 'q'; expected one of p, head"),
        ({"selector": "head"}, "selector='head' needs a single miner with selector_logits"),
        ({"u_dim": 0}, "u_dim is 0"),
        ({"rho": 1.0}, "rho is 1.0"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    given = {"generators": generators()[:1], "miners": nn.Linear(U_DIM, 5), "u_dim": U_DIM, **changes}
    with pytest.raises(ValueError, match=message):
        MultiMinedGenerator(**given)


def test_bad_inputs() -> None:
    made, z = several(), torch.randn(4, U_DIM + 1)
    with pytest.raises(ValueError, match=r"z has shape \(4, 2\); expected \[B, 3\]: 2 entries for the miner"):
        made(z[:, :2])
    with pytest.raises(ValueError, match=r"index has shape \(2,\); expected \[4\]"):
        made.pre_tanh(z, index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="index names generator 3; there are 3"):
        made.pre_tanh(z, index=torch.tensor([0, 1, 3, 0]))
    with pytest.raises(ValueError, match="1 noise maps are given"):
        made.pre_tanh(z, noise=[torch.zeros(4, 1, 4, 4)])


def test_only_miners_are_trained_while_mining() -> None:
    made, z = several(), torch.randn(5, U_DIM + 1)
    made.pre_tanh(z, index=torch.tensor([0, 1, 2, 0, 2])).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in made.generators.parameters())
    assert all(p.grad is not None for p in made.miners.parameters())
    made.train()
    assert made.training and not any(generator.training for generator in made.generators)
    made.fine_tune()
    assert all(generator.training for generator in made.generators)


def test_choices_teach_p_and_the_selector_after_the_warm_up_only() -> None:
    made, z = shared(), torch.randn(64, U_DIM + 1)
    before, scores = made.p.clone(), iter([torch.full((64,), float(k == 2)) for k in range(4)] * 2)

    def critic(images, y):
        return next(scores)

    made.warming = True
    warm = made.choose(z, critic)
    assert len(warm.unique()) == 4 and made.selection_loss(z, warm) is None and torch.equal(made.p, before)
    made.warming = False
    chosen = made.choose(z, critic)
    assert chosen.unique().tolist() == [2]
    with torch.no_grad():
        assert made.selection_loss(z, chosen) is None and torch.equal(made.p, before)
    loss = made.selection_loss(z, chosen)
    assert made.p.argmax() == 2 and made.p.sum().item() == pytest.approx(1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(made.selector_logits(z), chosen))
