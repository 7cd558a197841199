"""Settings and sizes of a study's runs, found by short trials on two CPU cores."""

from __future__ import annotations

from typing import Any

from .plan import Scale

_SIDE = 32

# Every run: judged after its last step, a checkpoint at times, no penalty of another loss.
_COMMON = {"device": "cpu", "snap": 500, "keep": 1, "tick": 250}


def digits_model(scale: Scale) -> dict[str, Any]:
    return {"arch": "mnist", "dim": scale.width_digits, "z_dim": 16}


def faces(scale: Scale) -> dict[str, dict[str, Any]]:
    """Descriptions of the pairs for drawings of 32 px, by family."""
    width = scale.width_faces
    common = {"size": _SIDE, "channels": 3}
    return {
        "wgan-resnet": {**common, "arch": "wgan-resnet", "dim": width // 2, "z_dim": 128},
        "gpgan": {**common, "arch": "resnet", "nf": width, "nf_max": 8 * width, "z_dim": 128},
        "dcgan": {**common, "arch": "dcgan", "ngf": 16, "ndf": 16, "z_dim": 64},
        "biggan": {**common, "arch": "biggan", "ch": 8, "classes": 6, "z_dim": 60},
    }


def digits_from_scratch(scale: Scale) -> dict[str, Any]:
    """Non-saturating with lazy R1: WGAN-GP with five critic steps takes nearly five times as long for each step."""
    return {
        **_COMMON,
        "batch": 2 * scale.batch,
        "precision": "fp32",
        "loss": "nonsat",
        "r1_gamma": 3.0,
        "lr_g": 1e-3,
        "lr_d": 1e-3,
        "data_scale": 0.95,
        "saturation": 0.1,
        "ema": 0.995,
        "eval_every": -1,
    }


def mining(scale: Scale) -> dict[str, Any]:
    """A miner on a source of digits, both stages of one length of run."""
    return {
        **_COMMON,
        "batch": 2 * scale.batch,
        "precision": "fp32",
        "loss": "nonsat",
        "r1_gamma": 0.3,
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "lr_miner": 3e-3,
        "miner_hidden": 128,
        "ema": 0.99,
        "steps": scale.steps_mining,
        "eval_samples": scale.samples,
        "extractor": "random-v1",
    }


def two_sources(scale: Scale) -> dict[str, Any]:
    """Two sources of digits. The critic is trained on the winners' images, so a fast one forgets what the losers' are
    like and p moves back; a slow one remembers."""
    return {
        **mining(scale),
        **course(scale.steps_two),
        "stage2": "none",
        "select": "sample-max",
        "lr_d": 1e-4,
        "steps": scale.steps_two,
        "mining_warmup": scale.steps_two // 10,
    }


def course(steps: int) -> dict[str, Any]:
    """Checkpoints kept along a run, of which the course of p is read."""
    return {"snap": max(1, steps // 8), "keep": 10}


def wgan(scale: Scale) -> dict[str, Any]:
    """TransferGAN's family: WGAN-GP, its source as well as what is transferred."""
    return {
        **_COMMON,
        "batch": scale.batch,
        "loss": "wgan-gp",
        "critic_steps": 3,
        "order": "discriminator-first",
        "r1_interval": 3,
        "lr_g": 3e-4,
        "lr_d": 3e-4,
        "beta1": 0.0,
        "beta2": 0.9,
        "ema": 0.99,
        "eval_every": -1,
        "eval_samples": scale.samples,
        "extractor": scale.extractor,
    }


def gpgan_from_scratch(scale: Scale) -> dict[str, Any]:
    """A GP-GAN pair from random weights, as source and as the baseline of the methods."""
    return {
        **_COMMON,
        "batch": scale.batch,
        "loss": "nonsat",
        "lr_g": 1e-3,
        "lr_d": 1e-3,
        "r1_gamma": 30.0,
        "saturation": 0.1,
        "data_scale": 0.95,
        "ema": 0.999,
        "eval_every": -1,
    }


def on_gpgan(method: str, scale: Scale) -> dict[str, Any]:
    """Settings of a method on a GP-GAN source; all train for the same steps."""
    judged = {"steps": scale.steps_methods, "eval_every": 0}
    judged |= {"eval_samples": scale.samples, "extractor": scale.extractor}
    if method == "scratch":
        return {**gpgan_from_scratch(scale), **judged}
    common = {**_COMMON, "batch": scale.batch, "loss": "nonsat", "r1_gamma": 10.0, **judged}
    return {
        **common,
        **{
            "transfergan": {},
            "adafm": {"freeze_g": 3},
            "gan-memory": {"lr_gamma": 1e-3, "lr_beta": 1e-3},
            "minegan": {"stage2_start": scale.steps_methods // 3},
        }[method],
    }


def small(scale: Scale) -> dict[str, Any]:
    """A few steps of any family, to train something; nothing is judged by its pictures."""
    return {
        **_COMMON,
        "batch": scale.batch,
        "precision": "fp32",
        "loss": "nonsat",
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "eval_every": -1,
    }


def outside(scale: Scale) -> dict[str, Any]:
    """Two DCGANs of 64 px without a critic, which therefore begins at random and warms up."""
    return {
        **_COMMON,
        "batch": scale.batch,
        "loss": "nonsat",
        "r1_gamma": 1.0,
        "lr_d": 5e-4,
        "lr_miner": 5e-4,
        "ema": 0.99,
        "stage2": "none",
        "steps": scale.steps_outside,
        **course(scale.steps_outside),
        "mining_warmup": scale.steps_outside // 3,
        "eval_every": -1,
    }
