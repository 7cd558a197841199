"""Cases of whole networks: gpgan_, adafm_generator, frechet."""

from __future__ import annotations

import torch
from adafm_trainer.models.checkpoints import infer_config
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.names import state_from_reference
from torch import Tensor, nn

from .compare import GoldenFile


def gpgan(golden: GoldenFile) -> dict[str, Tensor]:
    sizes = golden.config
    cfg = ModelConfig(
        arch=sizes["arch"],
        size=sizes["size"],
        channels=golden.tensors["in.x"].shape[1],
        nf=sizes["nf"],
        nf_max=sizes.get("nfmax"),
        z_dim=sizes["z"],
        embed=sizes["embed"],
        nlabels=sizes["nlabels"],
    )
    z, y, x = golden.get("in.z"), golden.get("in.y"), golden.get("in.x").requires_grad_()
    generator = loaded(build_generator(cfg), golden.under("in.generator.module."), z.dtype)
    discriminator = loaded(build_discriminator(cfg), golden.under("in.discriminator.module."), x.dtype)
    image, logit = generator(z, y), discriminator(x, y)
    (gradient,) = torch.autograd.grad(logit.sum(), x)
    return {
        "out.image": image,
        "out.pre_tanh": generator.pre_tanh(z, y),
        "out.logit": logit,
        "out.logit_of_image": discriminator(image, y),
        "out.r1_per_sample": gradient.square().sum((1, 2, 3)),
    }


def adafm_generator(golden: GoldenFile) -> dict[str, Tensor]:
    state, z, y = state_from_reference(golden.under("in.generator.")), golden.get("in.z"), golden.get("in.y")
    cfg, sizes = infer_config("adafm", {"generator": state}), golden.config
    assert (cfg.nf, cfg.z_dim, cfg.style_dim, cfg.s0) == (sizes["nf"], sizes["z"], sizes["S"], sizes["s0"])
    generator, results = loaded(build_generator(cfg), state, z.dtype), {}
    for key in golden.expected:
        if key.startswith("out.mid."):
            module = generator.get_submodule(key.removeprefix("out.mid."))
            module.register_forward_hook(lambda _, __, output, key=key: results.update({key: output}))
    results["out.image"] = generator(z, y, golden.sequence("in.noise."))
    results["out.loss_w"] = generator.style(z).square().sum(1)
    return results


def frechet(golden: GoldenFile) -> dict[str, Tensor]:
    from adafm_trainer.metrics.frechet import frechet_distance

    distance = frechet_distance(golden.get("in.a"), golden.get("in.b"))
    return {"out.fid": torch.as_tensor(distance, dtype=torch.float64)}


def loaded(module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """``module`` in ``dtype`` with exactly the tensors of ``state``."""
    module.to(dtype).load_state_dict(state)
    return module
