"""Cases of MineGAN's networks and steps: minegan_biggan_, minegan_style_miners."""

from __future__ import annotations

from collections.abc import Callable

import torch
from adafm_trainer.models.biggan import BigGANDiscriminator, BigGANGenerator
from adafm_trainer.models.biggan_source import infer
from adafm_trainer.models.mined import MinedGenerator
from adafm_trainer.models.miners import BigGANMiner, MLPMiner
from adafm_trainer.models.spectral import SpectralNorm
from adafm_trainer.models.style_miners import ConstantMiner, NoiseMapMiner
from torch import Tensor, nn

from .biggan import buffers, described, gradients, wide
from .compare import GoldenFile

UNUSED = "shared.weight"
"""Part of the reference's miner that nothing reads; our miner passes over it."""


def biggan_miner(golden: GoldenFile) -> dict[str, Tensor]:
    state, results = golden.under("state."), {}
    for mode in ("train", "eval"):
        miner, u = wide(_miner(golden, state), state, mode), golden.get("in.z").double().requires_grad_()
        z, y = miner(u)
        ((z * golden.get("in.cot_z")).sum() + (y * golden.get("in.cot_y")).sum()).backward()
        results |= {f"out.{mode}.z": z, f"out.{mode}.y_emb": y, f"grad_in.{mode}.z": u.grad}
        if mode == "train":
            results |= gradients("grad.train.", miner) | buffers("post.train.", miner)
    return results


def biggan_step(golden: GoldenFile) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for kind in ("dcgan", "hinge"):
        mined, discriminator = _networks(golden)
        real, fake = _discriminator_step(
            mined, discriminator, golden.get("in.x").double(), golden.get("in.zD").double()
        )
        losses = dict(zip(("loss_real", "loss_fake"), _discriminator_losses(kind)(real, fake), strict=True))
        sum(losses.values()).backward()
        results |= {f"D.{kind}.{name}": value for name, value in losses.items()}
        results |= {f"D.{kind}.logit_real": real.unsqueeze(1), f"D.{kind}.logit_fake": fake.unsqueeze(1)}
        results |= gradients(f"D.{kind}.grad.", discriminator)
    for stage in (1, 2):
        mined, discriminator = _networks(golden)
        if stage == 2:
            mined.fine_tune()
        discriminator.requires_grad_(False)
        logits = discriminator(mined(golden.get("in.zM").double()))
        loss = _miner_loss(logits)
        loss.backward()
        at = f"M.stage{stage}."
        results |= {f"{at}loss": loss, f"{at}logit_fake": logits.unsqueeze(1)}
        results |= gradients(f"{at}grad.M.", mined.miner) | gradients(f"{at}grad.G.", mined.generator)
    surplus = [key for key in results if ".grad." in key and key not in golden.expected]
    assert not surplus, f"gradients that the reference does not have: {surplus[:5]}"
    return results


def biggan_trajectory(golden: GoldenFile) -> dict[str, Tensor]:
    sizes, metadata = golden.config, golden.metadata
    mined, discriminator = _networks(golden)
    adam_m, adam_g, adam_d = (
        torch.optim.Adam(
            network.parameters(),
            lr=sizes[f"{player}_lr"],
            betas=(sizes[f"{player}_B1"], sizes[f"{player}_B2"]),
            eps=sizes["adam_eps"],
        )
        for network, player in ((mined.miner, "G"), (mined.generator, "G"), (discriminator, "D"))
    )
    images, for_d, for_m = (golden.get(f"in.{name}").double() for name in ("x", "zD", "zM"))
    losses = []
    for t in range(int(metadata["iterations"])):
        if t == int(metadata["stage1_iterations"]):
            mined.fine_tune()
        discriminator.requires_grad_(True).zero_grad()
        real, fake = _discriminator_step(mined, discriminator, images[t], for_d[t])
        loss_real, loss_fake = _discriminator_losses("dcgan")(real, fake)
        (loss_real + loss_fake).backward()
        adam_d.step()
        discriminator.requires_grad_(False)
        mined.zero_grad()
        loss = _miner_loss(discriminator(mined(for_m[t])))
        loss.backward()
        adam_m.step()
        if not mined.mining:
            adam_g.step()
        losses.append(torch.stack([loss_real, loss_fake, loss]).detach())
    results = {"out.losses": torch.stack(losses)}
    for name, network in (("M", mined.miner), ("G", mined.generator), ("D", discriminator)):
        results |= {f"final.{name}.{key}": value for key, value in network.state_dict().items()}
    return results | {f"final.M.{UNUSED}": golden.get(f"state.M.{UNUSED}").double()}


def style_miners(golden: GoldenFile) -> dict[str, Tensor]:
    states = {name: golden.under(f"state.{name}.") for name in ("miner", "semantic_fc", "semantic_conv")}
    code, width = states["miner"]["transform.2.weight"].shape
    maps = 1 + sum(name.endswith(".1.weight") for name in states["semantic_fc"])
    channels = states["semantic_conv"]["conv3.weight"].shape[0]
    networks = {
        "miner": MLPMiner(states["miner"]["transform.0.weight"].shape[1], code, width, "reference"),
        "semantic_fc": NoiseMapMiner(states["semantic_fc"]["transform_4.0.weight"].shape[1], maps),
        "semantic_conv": ConstantMiner(states["semantic_conv"]["input.input"].shape[1], channels),
    }
    codes = [z.double().requires_grad_() for z in golden.sequence("in.miner.z")]
    noise = golden.get("in.semantic_fc.noise").double().requires_grad_()
    arguments = {"miner": codes, "semantic_fc": noise, "semantic_conv": int(golden.metadata["batch"])}
    results: dict[str, Tensor] = {}
    for name, network in networks.items():
        made = wide(network, states[name])(arguments[name])
        made = [made] if isinstance(made, Tensor) else made
        cots = golden.sequence(f"in.cot.{name}.")
        sum((value * cot).sum() for value, cot in zip(made, cots, strict=True)).backward()
        results |= {f"out.{name}.{i}": value for i, value in enumerate(made)} | gradients(f"grad.{name}.", network)
    results |= {f"grad_in.miner.{i}": z.grad for i, z in enumerate(codes)} | {"grad_in.semantic_fc.0": noise.grad}
    return results


def _networks(golden: GoldenFile) -> tuple[MinedGenerator, nn.Module]:
    """Miner, generator and discriminator in train mode; the generator's buffers move, as in the reference."""
    states, sizes = {name: golden.under(f"state.{name}.") for name in ("M", "G", "D")}, golden.config
    assert sizes["num_G_SVs"] == sizes["num_D_SVs"] and sizes["num_G_SV_itrs"] == sizes["num_D_SV_itrs"]
    cfg = described(golden, infer("biggan", {"generator": states["G"], "discriminator": states["D"]}))
    generator = wide(BigGANGenerator(cfg), states["G"])
    mined = MinedGenerator(wide(_miner(golden, states["M"]), states["M"]), generator, freeze_buffers=False)
    return mined.train(), wide(BigGANDiscriminator(cfg), states["D"])


def _miner(golden: GoldenFile, state: dict[str, Tensor]) -> BigGANMiner:
    shared_dim, z_dim = state["linear8.weight"].shape
    sizes = golden.config
    norm = SpectralNorm(sizes["num_G_SVs"], sizes["num_G_SV_itrs"], sizes["SN_eps"])
    return BigGANMiner(z_dim, shared_dim, "reference", norm=norm)


def _discriminator_step(mined: MinedGenerator, discriminator: nn.Module, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of real and mined images; M and G run without gradients in train mode, D judges both in one pass."""
    with torch.no_grad():
        fake = mined(u)
    logits = discriminator(torch.cat([fake, x]))
    return logits[len(fake) :], logits[: len(fake)]


def _discriminator_losses(kind: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from adafm_trainer.methods.losses import fake_loss, real_loss

    if kind == "dcgan":
        return lambda real, fake: (real_loss(real), fake_loss(fake))
    return lambda real, fake: (torch.relu(1 - real).mean(), torch.relu(1 + fake).mean())


def _miner_loss(logits: Tensor) -> Tensor:
    from adafm_trainer.methods.losses import generator_loss

    return generator_loss(logits)
