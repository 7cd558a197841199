"""Activation checkpointing: the same gradients bit for bit, fewer bytes kept for the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from adafm_trainer.methods.losses import gradient_penalty
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.convolution import ExplicitDoubleBackward
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.transfer import freeze, modulate_blocks
from adafm_trainer.trainer.start import start_run
from tiny import digest, image_folder, settings, source_folder

MODELS = {
    "resnet": ModelConfig("resnet", 32, nf=8, nf_max=16, z_dim=5),
    "resnet3": ModelConfig("resnet3", 64, nf=2, z_dim=5, embed=2, nlabels=3),
    "adafm": ModelConfig("adafm", 64, nf=8, nf_max=16, z_dim=5, base="resnet", keep=3, style_dim=6),
}


def storage_bytes(tensors: list[torch.Tensor], known: set[int]) -> int:
    """Bytes of the distinct storages of ``tensors`` that are not in ``known``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for at, size in storages.items() if at not in known)


def gradients(network, loss, autocast):
    """Gradients of every parameter of ``network`` and the bytes that the forward pass kept for them."""
    network.zero_grad()
    saved: list[torch.Tensor] = []
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(network)
            value = gradient_penalty(*value).mean() if isinstance(value, tuple) else value
        kept = storage_bytes(saved, known)
        value.backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}, kept


def compare(network, loss, autocast, most=0.7):
    """Gradients are bitwise equal, and checkpointing keeps at most ``most`` of the bytes."""
    twin = copy.deepcopy(network)
    twin.checkpoint_activations = True
    plain, kept = gradients(network, loss, autocast)
    again, kept_again = gradients(twin, loss, autocast)
    assert plain and plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(gradient.any() for gradient in plain.values())
    assert kept_again <= most * kept, (kept_again, kept)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_generator_gradients_are_the_same_bits_from_fewer_bytes(name, autocast):
    torch.manual_seed(0)
    generator = build_generator(MODELS[name])
    z = torch.randn(4, 5)
    noise = [torch.randn(4, 1, *shape) for shape in generator.noise_shapes]
    # Through the discriminator as in training: the sum of the image alone has a gradient that is the same everywhere.
    judge = build_discriminator(MODELS[name]).requires_grad_(False)
    judge.checkpoint_activations = True
    compare(generator, lambda g: judge(g(z, None, noise)).float().sum(), autocast)


def test_modulated_and_frozen_blocks_too():
    torch.manual_seed(0)
    generator = build_generator(MODELS["resnet"])
    modulate_blocks(generator, MODELS["resnet"], 3)
    freeze(generator, MODELS["resnet"], 1)
    z = torch.randn(4, 5)
    compare(generator, lambda g: g(z).square().sum(), False)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["resnet", "resnet3"])
@pytest.mark.parametrize("penalised", [False, True], ids=["loss", "R1"])
def test_discriminator_gradients_are_the_same_bits_from_no_more_bytes(name, autocast, penalised):
    torch.manual_seed(0)
    cfg = MODELS[name]
    x = torch.randn(4, cfg.channels, cfg.size, cfg.size, requires_grad=penalised)

    def loss(discriminator):
        logits = discriminator(x)
        return (logits, x) if penalised else logits.float().sum()

    # The penalty's own graph holds the maps that it made again: they are not fewer, and the step's others are.
    compare(build_discriminator(cfg), loss, autocast, most=1.0 if penalised else 0.7)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_explicit_convolutions_are_computed_again_as_such(autocast):
    torch.manual_seed(0)
    cfg = MODELS["resnet"]
    x = torch.randn(4, cfg.channels, cfg.size, cfg.size, requires_grad=True)

    def loss(discriminator):
        # The backward runs outside of the context, where convolutions are PyTorch's.
        with ExplicitDoubleBackward():
            return discriminator(x), x

    compare(build_discriminator(cfg), loss, autocast, most=1.0)


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    generator, z = build_generator(MODELS["resnet"]), torch.randn(2, 5)
    with torch.no_grad():
        plain = generator(z)
    generator.checkpoint_activations = True
    # Whoever calls this fails.
    monkeypatch.setattr("adafm_trainer.models.recompute.checkpoint", None)
    with torch.no_grad():
        assert torch.equal(generator(z), plain)


@pytest.mark.parametrize(("head", "precision"), [("source", "fp32"), ("source", "bf16"), ("new", "fp32")])
def test_a_run_ends_at_the_same_bits(tmp_path, head, precision):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    common = {"freeze_g": 2, "head": head, "steps": 3, "precision": precision}
    plain = start_run("adafm", settings(tmp_path, "plain", **common))
    again = start_run("adafm", settings(tmp_path, "again", checkpoint_activations=True, **common))
    assert digest(plain) == digest(again)
