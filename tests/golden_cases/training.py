"""Cases of whole training iterations, taken by the trainer's own step: train_."""

from __future__ import annotations

import dataclasses

import torch
from adafm_trainer.models.checkpoints import infer_config
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.names import state_from_reference, to_reference
from adafm_trainer.models.transfer import freeze
from torch import Tensor, nn

from .compare import GoldenFile
from .networks import loaded

# Constants of the reference's experiments, which the files do not repeat.
LEARNING_RATE, BETAS, AVERAGE_DECAY = 1e-4, (0.0, 0.99), 0.999


def train(golden: GoldenFile) -> dict[str, Tensor]:
    from adafm_trainer.methods.adafm import hold, release
    from adafm_trainer.methods.average import Average
    from adafm_trainer.methods.gan_step import GanStep
    from adafm_trainer.methods.player import Player
    from adafm_trainer.methods.step_config import StepConfig

    sizes, modulated = golden.config, golden.config["model"] == "adafm"
    generator, discriminator, frozen = _networks(golden, modulated)
    freeze(generator, generator.cfg, frozen)
    freeze(discriminator, discriminator.cfg, sizes["dfix"])
    averaged = [name for name, _ in generator.named_parameters()]
    opt_g, opt_d = (
        torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=1e-8, fused=True)
        for network in (generator, discriminator)
    )
    average = Average(generator, averaged, AVERAGE_DECAY)
    config = StepConfig(loss="nonsat", reg_type=sizes["reg"], reg_param=sizes["reg_param"], reg_interval=1)
    step = GanStep(Player(generator, opt_g), Player(discriminator, opt_d), config)

    results: dict[str, Tensor] = {}
    for t in range(sizes["iters"]):
        if modulated:
            (release if t else hold)(generator)
        at = f"in.it{t}."
        first = step.generator(golden.get(f"{at}z"), noise=golden.sequence(f"{at}noise."))
        _add_gradients(results, f"out.it{t}.grad_G.", generator)
        average.update()
        second = step.discriminator(golden.get(f"{at}x_real"), first.images)
        _add_gradients(results, f"out.it{t}.grad_D.", discriminator)
        penalties = {"r1_real": second.r1_real, "r1_fake": second.r1_fake}
        computed = {
            "gloss": first.loss,
            "x_fake": first.images,
            "dloss": second.loss_real + second.loss_fake,
            "reg_returned": second.reg_real if second.reg_fake is None else second.reg_fake,
            **{name: value for name, value in penalties.items() if value is not None},
        }
        results |= {f"out.it{t}.{name}": value.clone() for name, value in computed.items()}
    for name, network in (("G", generator), ("D", discriminator), ("ema", average.module)):
        results |= {f"out.final.{name}.{to_reference(key)}": value for key, value in network.state_dict().items()}
    _require_same_gradients(golden, results)
    return results


def _networks(golden: GoldenFile, modulated: bool) -> tuple[nn.Module, nn.Module, int]:
    sizes = golden.config
    state_g, state_d = state_from_reference(golden.under("in.G.")), golden.under("in.D.")
    cfg = infer_config("adafm" if modulated else "resnet2", {"generator": state_g, "discriminator": state_d})
    assert (cfg.size, cfg.nf, cfg.z_dim) == (sizes["size"], sizes["nf"], sizes["z"])
    cfg_d = dataclasses.replace(cfg, nf=sizes["dnf"], nlabels=state_d["fc.weight"].shape[0])
    dtype = state_g["conv_img.weight"].dtype
    generator = loaded(build_generator(cfg), state_g, dtype)
    discriminator = loaded(build_discriminator(cfg_d), state_d, dtype)
    return generator, discriminator, cfg.keep if modulated else -sizes["gfix"]


def _add_gradients(results: dict[str, Tensor], prefix: str, network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            results[prefix + to_reference(name)] = parameter.grad.clone()


def _require_same_gradients(golden: GoldenFile, results: dict[str, Tensor]) -> None:
    """A gradient that the reference does not have belongs to a parameter that should be frozen."""
    surplus = [key for key in results if ".grad_" in key and key not in golden.expected]
    assert not surplus, f"gradients of parameters that the reference freezes: {surplus[:5]}"
