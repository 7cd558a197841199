"""Cases of BigGAN: biggan_g_, biggan_d_, biggan_sn."""

from __future__ import annotations

import dataclasses
import re

import torch
from adafm_trainer.models.biggan import BigGANDiscriminator, BigGANGenerator
from adafm_trainer.models.biggan_config import BigGANConfig
from adafm_trainer.models.biggan_source import infer
from adafm_trainer.models.spectral import SpectralConv2d, SpectralNorm
from torch import Tensor, nn

from .compare import GoldenFile

# The file of the spectral norm says this in words only.
SN_EPS = 1e-12


def generator(golden: GoldenFile) -> dict[str, Tensor]:
    state, cot, y = golden.under("state."), golden.get("in.cot").double(), golden.get("in.y")
    cfg = described(golden, infer("biggan", {"generator": state}))
    results: dict[str, Tensor] = {}
    for mode in ("train", "eval"):
        network = wide(BigGANGenerator(cfg), state, mode)
        inputs = {"z": golden.get("in.z").double().requires_grad_()}
        if "in.y_emb" in golden.tensors:
            inputs["y_emb"] = golden.get("in.y_emb").requires_grad_()
            assert torch.equal(inputs["y_emb"], network.shared(y)), "in.y_emb is not the embedding of in.y"
        image = network(inputs["z"], inputs.get("y_emb", y))
        (image * cot).sum().backward()
        results[f"out.{mode}.img"] = image
        results |= {f"grad_in.{mode}.{name}": value.grad for name, value in inputs.items()}
        if mode == "train":
            results |= gradients("grad.train.", network) | buffers("post.train.", network)
        elif "y_emb" in inputs:
            # In eval mode nothing moves: the labels themselves must give the same image.
            assert torch.equal(network(inputs["z"], y), image)
    return results


def discriminator(golden: GoldenFile) -> dict[str, Tensor]:
    state, cot = golden.under("state."), golden.get("in.cot").double().squeeze(1)
    cfg = _discriminator_config(golden, state)
    results: dict[str, Tensor] = {}
    for kind, y in (("proj", golden.get("in.y")), ("uncond", None)):
        for mode in ("train", "eval"):
            network, x = wide(BigGANDiscriminator(cfg), state, mode), golden.get("in.x").double().requires_grad_()
            logits = network(x, y)
            (logits * cot).sum().backward()
            results[f"out.{kind}.{mode}.logit"] = logits.unsqueeze(1)
            results[f"grad_in.{kind}.{mode}.x"] = x.grad
            if mode == "train":
                results |= gradients(f"grad.{kind}.train.", network) | buffers(f"post.{kind}.train.", network)
    return results


def spectral_norm(golden: GoldenFile) -> dict[str, Tensor]:
    weight, vectors = golden.get("in.weight").double(), golden.get("in.u").double()
    cot, results = golden.get("in.cot").double(), {}
    out, fin, *kernel = weight.shape
    for key in golden.expected:
        if not (found := re.fullmatch(r"out\.(svs(\d+)_itrs(\d+))\.weight_sn", key)):
            continue
        norm = SpectralNorm(int(found[2]), int(found[3]), SN_EPS)
        layer = SpectralConv2d(fin, out, tuple(kernel), bias=False, norm=norm).double()
        start = {f"u{i}": vectors[i] for i in range(norm.values)}
        missing = layer.load_state_dict({"weight": weight, **start}, strict=False).missing_keys
        assert all(name.startswith("sv") for name in missing), missing
        normalized = layer.train().normalized_weight()
        (normalized * cot).sum().backward()
        results[key] = normalized
        results |= gradients(f"grad.{found[1]}.", layer) | buffers(f"post.{found[1]}.", layer)
    return results


def described(golden: GoldenFile, cfg: BigGANConfig) -> BigGANConfig:
    """``cfg``, told from the tensors, with what only the file's description tells, after checking what both tell."""
    sizes = golden.config
    told = (cfg.size, cfg.ch, cfg.classes, bool(cfg.shared_dim), cfg.hier)
    assert told == tuple(sizes[name] for name in ("resolution", "G_ch", "n_classes", "G_shared", "hier"))
    return dataclasses.replace(
        cfg, sn_values=sizes["num_G_SVs"], sn_iterations=sizes["num_G_SV_itrs"], sn_eps=sizes["SN_eps"],
        bn_eps=sizes["BN_eps"],
    )  # fmt: skip


def wide(network: nn.Module, state: dict[str, Tensor], mode: str = "train") -> nn.Module:
    """``network`` in float64 with the float32 values of ``state``."""
    network.double().load_state_dict(state)
    return network.train(mode == "train")


def gradients(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def buffers(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in network.named_buffers()}


def _discriminator_config(golden: GoldenFile, state: dict[str, Tensor]) -> BigGANConfig:
    """The file has no generator: sizes from its description, attention from the tensors."""
    sizes = golden.config
    bare = BigGANConfig(
        size=sizes["resolution"],
        channels=golden.tensors["in.x"].shape[1],
        ch=sizes["D_ch"],
        z_dim=1,
        classes=sizes["n_classes"],
        hier=False,
        d_attention=(),
        g_attention=(),
        sn_values=sizes["num_D_SVs"],
        sn_iterations=sizes["num_D_SV_itrs"],
        sn_eps=sizes["SN_eps"],
    )
    sides = {b.side for i, b in enumerate(bare.discriminator_blocks()) if f"blocks.{i}.1.theta.weight" in state}
    return dataclasses.replace(bare, d_attention=tuple(sides))
