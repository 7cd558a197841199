"""Miners and the mined generator: shapes, initialisations, stages, and what stage 1 leaves alone."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from adafm_trainer.methods.losses import generator_loss
from adafm_trainer.models.biggan import BigGANDiscriminator, BigGANGenerator
from adafm_trainer.models.biggan_config import BigGANConfig
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.gpgan import build_generator
from adafm_trainer.models.mined import MinedGenerator
from adafm_trainer.models.miners import BigGANMiner, MLPMiner, miner_for
from adafm_trainer.models.style_miners import ConstantMiner, NoiseMapMiner, noise_maps
from biggans import same, snapshot

BIGGAN = BigGANConfig(size=32, ch=2, z_dim=8, classes=3, shared_dim=5, g_attention=(16,), d_attention=(16,))
GPGAN = ModelConfig("resnet", 16, nf=4, nf_max=8, z_dim=6, embed=2, nlabels=3)


def biggan(init: str = "ortho") -> BigGANGenerator:
    torch.manual_seed(0)
    network = BigGANGenerator(dataclasses.replace(BIGGAN, init=init))
    with torch.no_grad():
        network(torch.randn(8, BIGGAN.z_dim), torch.arange(8) % 3)
    return network


def mine_once(mined: MinedGenerator, steps: int = 2) -> None:
    """Adam steps on what requires a gradient, as in a run: D in train mode and without gradients of its own."""
    torch.manual_seed(1)
    judge = BigGANDiscriminator(BIGGAN).requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in mined.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        generator_loss(judge(mined(torch.randn(4, mined.z_dim)))).backward()
        optimizer.step()


# --- initialisations


def test_identity_starts_at_the_source_samples_biggan():
    source = biggan().eval()
    mined = MinedGenerator(miner_for(source), source)
    z = torch.randn(4, BIGGAN.z_dim)
    embedding = source.shared.weight.mean(0).expand(4, -1)
    for mode in (True, False):
        assert torch.equal(mined.train(mode)(z), source(z, embedding))


def test_identity_starts_at_the_source_samples_of_any_generator():
    torch.manual_seed(0)
    source = build_generator(GPGAN)
    mined, z, y = MinedGenerator(miner_for(source), source), torch.randn(4, 6), torch.tensor([0, 2, 1, 1])
    assert torch.equal(mined(z, y), source(z, y)) and torch.equal(mined.pre_tanh(z, y), source.pre_tanh(z, y))


def test_identity_can_be_left():
    source = biggan()
    mined = MinedGenerator(miner_for(source), source)
    z = torch.randn(4, BIGGAN.z_dim)
    before = [part.clone() for part in mined.miner(z)]
    mine_once(mined, 1)
    assert all(not torch.equal(a, b) for a, b in zip(before, mined.miner(z), strict=True))


@pytest.mark.parametrize(("u_dim", "z_dim"), [(4, 10), (10, 4)])
def test_identity_between_unequal_sizes_repeats_or_cuts(u_dim, z_dim):
    u = torch.randn(3, u_dim)
    expected = torch.stack([u[:, j % u_dim] for j in range(z_dim)], 1)
    assert torch.equal(MLPMiner(u_dim, z_dim)(u), expected)


def test_spread_of_the_biggan_inits():
    """Section 3.1 of the notes on MineGAN: 0.067 and 0.066 for the reference's, 1.00 for orthogonal matrices."""
    torch.manual_seed(0)
    spread = {}
    for init in ("reference", "orthogonal"):
        miner = BigGANMiner(120, 128, init)
        with torch.no_grad():
            for _ in range(60):
                miner(torch.randn(2, 120))
            spread[init] = [part.std(0).mean().item() for part in miner.eval()(torch.randn(2048, 120))]
    assert spread["reference"] == pytest.approx([0.067, 0.066], rel=0.1)
    # 120 directions lie in the 128 dimensions of the embedding.
    assert spread["orthogonal"] == pytest.approx([1.0, (120 / 128) ** 0.5], rel=0.02)
    assert sum(p.numel() for p in miner.parameters()) == 117_128


def test_spread_of_the_style_init():
    torch.manual_seed(0)
    z = MLPMiner(512, 512, init="reference")(torch.randn(1024, 512)).detach()
    unit = F.normalize(z, dim=1)
    cosine = ((unit @ unit.t()).sum() - len(z)) / (len(z) * (len(z) - 1))
    assert z.std(0).mean().item() == pytest.approx(0.19, rel=0.05)
    assert z.mean(0).norm().item() == pytest.approx(3.0, rel=0.1)
    assert cosine.item() == pytest.approx(0.32, rel=0.15)


def test_orthogonal_and_glorot_matrices():
    torch.manual_seed(0)
    first, _, second = MLPMiner(12, 12, init="orthogonal").transform
    torch.testing.assert_close(first.weight @ first.weight.t(), torch.eye(12), atol=1e-5, rtol=0)
    assert not first.bias.any() and not second.bias.any()
    first = MLPMiner(4, 128, init="glorot").transform[0]
    bound = (6 / (4 + 128)) ** 0.5
    assert 0.95 * bound < first.weight.abs().max() <= bound and not first.bias.any()


# --- shapes and errors


def test_a_list_of_codes_passes_one_by_one():
    miner, codes = MLPMiner(5, 7, 3, "reference"), [torch.randn(2, 5), torch.randn(4, 5)]
    found = miner(codes)
    assert [tuple(z.shape) for z in found] == [(2, 7), (4, 7)]
    assert all(torch.equal(z, miner(u)) for z, u in zip(found, codes, strict=True))


def test_style_miners_fit_generators_that_take_maps_or_a_constant():
    miner = NoiseMapMiner(16, 4)
    assert [tuple(m.shape) for m in noise_maps(miner(torch.randn(3, 16)))] == [(3, 1, s, s) for s in (4, 8, 16, 32)]
    assert ConstantMiner(2, 9)(3).shape == (3, 9, 4, 4)
    with pytest.raises(ValueError, match="a map of 6 values is not square"):
        noise_maps(NoiseMapMiner(6, 1)(torch.randn(1, 6)))
    with pytest.raises(ValueError, match="maps 0"):
        NoiseMapMiner(16, 0)
    with pytest.raises(ValueError, match="channels 0"):
        ConstantMiner(8, 0)


def test_the_unused_table_of_the_reference_is_passed_over():
    miner = BigGANMiner(6, 4, "reference")
    state = {**snapshot(BigGANMiner(6, 4, "reference")), "shared.weight": torch.ones(3, 4)}
    miner.load_state_dict(state)
    assert "shared.weight" in state and torch.equal(miner.linear8.weight, state["linear8.weight"])
    mined = MinedGenerator(miner_for(biggan(), "reference"), biggan())
    mined.load_state_dict({**mined.state_dict(), "miner.shared.weight": torch.ones(3, 5)})
    with pytest.raises(RuntimeError, match="generator.extra"):
        mined.load_state_dict({**mined.state_dict(), "generator.extra": torch.ones(1)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPMiner(0, 4), "u_dim is 0"),
        (lambda: MLPMiner(4, 4, 0), "hidden is 0"),
        (
            lambda: MLPMiner(4, 4, init="zeros"),
            "miner_init is 'zeros'; expected one of identity, orthogonal, reference",
        ),
        (lambda: BigGANMiner(4, 3, "glorot"), "miner_init is 'glorot'"),
        (lambda: BigGANMiner(4, 3), r"embedding is None; init identity needs one class embedding \[3\]"),
        (lambda: BigGANMiner(4, 3, embedding=torch.ones(4)), r"embedding is \(4,\)"),
        (lambda: MLPMiner(4, 4)(torch.randn(2, 5)), r"input has shape \(2, 5\); expected \[B, 4\]"),
        (lambda: BigGANMiner(4, 3, "reference")(torch.randn(4)), r"input has shape \(4,\)"),
        (lambda: miner_for(biggan(), u_dim=4), "u_dim is 4 and hidden None; the miner of a BigGAN"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_miner_of_a_generator_has_its_sizes_and_type():
    miner = miner_for(biggan().double(), "orthogonal")
    assert (miner.u_dim, miner.z_dim, miner.shared_dim) == (8, 8, 5) and miner.linear.weight.dtype == torch.float64
    miner = miner_for(build_generator(GPGAN), "glorot", u_dim=4, hidden=9)
    assert (miner.u_dim, miner.z_dim, miner.transform[0].out_features) == (4, 6, 9)


# --- the mined generator


def test_stage_one_leaves_the_generator_bit_identical():
    source = biggan()
    mined = MinedGenerator(miner_for(source, "orthogonal"), source).train()
    before, miner = snapshot(source), snapshot(mined.miner)
    mine_once(mined)
    assert same(before, snapshot(source))
    assert all(p.grad is None for p in source.parameters())
    assert not source.training and mined.training and mined.miner.training
    assert all(not torch.equal(value, miner[name]) for name, value in mined.miner.named_parameters())


def test_the_reference_s_stage_one_moves_buffers_only():
    source = biggan("N02")
    mined = MinedGenerator(miner_for(source, "orthogonal"), source, freeze_buffers=False)
    before = snapshot(source)
    mine_once(mined)
    assert source.training
    assert all(torch.equal(p, before[name]) for name, p in source.named_parameters())
    # A normalised layer of one output has one singular value, found at once.
    moving = [name for name, b in source.named_buffers() if b.numel() > 1]
    assert len(moving) > 30 and all(not torch.equal(source.get_buffer(name), before[name]) for name in moving)


def test_stage_two_trains_the_generator_and_can_be_left_again():
    source = biggan()
    mined = MinedGenerator(miner_for(source), source).train()
    before = snapshot(source)
    mined.fine_tune()
    assert source.training
    mine_once(mined)
    # The embedding is mined: the table of the classes has no part.
    trained = {name: p for name, p in source.named_parameters() if name != "shared.weight"}
    assert all(
        not torch.equal(p, before[name]) for name, p in trained.items() if "conv" not in name or "weight" in name
    )
    assert torch.equal(source.shared.weight, before["shared.weight"])
    mined.mine()
    assert not source.training and not any(p.requires_grad for p in source.parameters())


def test_stage_two_can_train_part_of_the_generator():
    source = biggan()
    mined = MinedGenerator(miner_for(source), source).train()
    mined.fine_tune(source.output_layer.parameters())
    before = snapshot(source)
    mine_once(mined)
    moved = {name for name, p in source.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("output_layer.") for name in moved)
    with pytest.raises(ValueError, match=r"1 of the parameters to train are not the generator's; shapes \[\(2,\)\]"):
        mined.fine_tune([torch.nn.Parameter(torch.ones(2))])


def test_eval_mode_holds_in_both_stages():
    source = biggan()
    mined, u = MinedGenerator(miner_for(source, "reference"), source), torch.randn(3, 8)
    for enter in (mined.mine, mined.fine_tune):
        enter()
        mined.eval()
        before, first = snapshot(mined), mined(u)
        assert torch.equal(first, mined(u)) and same(before, snapshot(mined))


def test_it_is_a_generator_for_the_trainer():
    source = biggan()
    mined = MinedGenerator(miner_for(source), source)
    assert (mined.z_dim, mined.noise_shapes) == (8, ())
    mined.checkpoint_activations = True
    assert source.checkpoint_activations and mined.checkpoint_activations
    twin = copy.deepcopy(mined).eval()
    u, labels = torch.randn(3, 8), torch.tensor([0, 1, 2])
    assert torch.equal(twin(u, labels), mined.eval()(u))
    assert torch.equal(torch.tanh(mined.pre_tanh(u)), mined(u))
