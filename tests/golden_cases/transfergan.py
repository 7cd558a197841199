"""Cases of WGAN-GP training: minegan_transfergan_, _wgan_gp_mlp, _mnist_nets and _adam; biggan_losses.

The files hold float32 parameters and float64 results, networks under TensorFlow's names and in its layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from adafm_trainer.methods import losses
from adafm_trainer.methods.tf_adam import tf_epsilon
from adafm_trainer.models import mnist, wgan_resnet
from adafm_trainer.models.architecture import State
from torch import Tensor, nn

from .compare import GoldenFile


def transfergan(golden: GoldenFile) -> dict[str, Tensor]:
    family, state = wgan_resnet.ARCHITECTURE, golden.under("state.")
    cfg = family.infer("wgan-resnet", {"generator": state, "discriminator": state})
    assert (cfg.dim, cfg.classes) == (int(golden.metadata["dim"]), int(golden.metadata["n_classes"]))
    generator, critic = family.generator(cfg).double(), family.discriminator(cfg).double()
    for name, network in (("generator", generator), ("discriminator", critic)):
        network.load_state_dict({key: value.double() for key, value in family.rename(name, state).items()})
    z, real, e = (golden.get(f"in.{name}").double() for name in ("z", "x_real", "alpha"))
    y_real, y_fake = golden.get("in.y_real"), golden.get("in.y_fake")
    loss = losses.ADVERSARIAL[family.loss]

    img = generator(z, y_fake)
    between = losses.interpolate(real, img, e)
    norms = losses.gradient_norm(critic(between), between)
    gp = losses.gradient_norm_penalty(critic(between), between).mean()
    score_real, score_fake = critic(real), critic(img)
    d_loss = loss.fake(critic(img.detach())) + loss.real(score_real) + float(golden.metadata["lam"]) * gp
    g_loss = loss.generator(score_fake)
    results = {"out.img": img, "out.grad_norm": norms, "out.gp": gp}
    results |= {"out.score_real": score_real, "out.score_fake": score_fake}
    if cfg.classes:
        for name, images, y in (("real", real, y_real), ("fake", img, y_fake)):
            logits = critic.judge(images)[1]
            results |= {f"out.class_logits_{name}": logits, f"out.ac_{name}": losses.class_loss(logits, y)}
        d_loss = d_loss + float(golden.metadata["acgan_scale"]) * results["out.ac_real"]
        g_loss = g_loss + float(golden.metadata["acgan_scale_g"]) * results["out.ac_fake"]
    results |= {"out.d_loss": d_loss, "out.g_loss": g_loss}
    for name, network, total in (("discriminator", critic, d_loss), ("generator", generator, g_loss)):
        found = _published(family.rename, name, state, network, total)
        results |= {f"grad.{name[0]}_loss.{key}": value for key, value in found.items()}
    return results


def wgan_gp_mlp(golden: GoldenFile) -> dict[str, Tensor]:
    names = ("W1", "b1", "W2", "b2", "w3", "b3")
    real, fake, e = (golden.get(f"in.{name}").double() for name in ("x_real", "x_fake", "alpha"))
    loss, weight = losses.ADVERSARIAL["wgan-gp"], float(golden.metadata["lam"])
    results = {}
    activations: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "lrelu": lambda h: F.leaky_relu(h, 0.2)}
    for kind, activation in activations.items():
        parameters = {name: golden.get(f"in.{name}").double().requires_grad_() for name in names}

        def critic(x: Tensor, p: Mapping[str, Tensor] = parameters, a: Callable = activation) -> Tensor:
            return a(F.linear(a(F.linear(x, p["W1"], p["b1"])), p["W2"], p["b2"])) @ p["w3"] + p["b3"]

        between = losses.interpolate(real, fake, e)
        (gradient,) = torch.autograd.grad(critic(between).sum(), between)
        gp = losses.gradient_norm_penalty(critic(between), between).mean()
        one_sided = losses.gradient_norm_penalty(critic(between), between, one_sided=True).mean()
        images = real.clone().requires_grad_()
        r1_half = losses.gradient_penalty(critic(images), images).mean() / 2
        wass = loss.real(critic(real)) + loss.fake(critic(fake))
        totals = {"d_loss": wass + weight * gp, "gp": gp, "r1_half": r1_half}
        values = totals | {
            "x_interp": between,
            "grad_interp": gradient,
            "grad_norm": losses.gradient_norm(critic(between), between),
            "gp_one_sided": one_sided,
            "score_real": critic(real),
            "score_fake": critic(fake),
            "wass": wass,
            "g_loss": loss.generator(critic(fake)),
        }
        results |= {f"out.{kind}.{name}": value for name, value in values.items()}
        for name, total in totals.items():
            results |= _gradients(f"grad.{kind}.{name}", parameters, total)
    return results


def mnist_nets(golden: GoldenFile) -> dict[str, Tensor]:
    family, state = mnist.ARCHITECTURE, golden.under("state.")
    prefix = "teacher_Adaptor_Generator."
    pair = {name: value for name, value in state.items() if not name.startswith(prefix)}
    cfg = family.infer("mnist", {"generator": pair})
    assert (cfg.dim, cfg.z_dim) == (int(golden.metadata["dim"]), int(golden.metadata["noise_len"]))
    generator, critic = family.generator(cfg).double(), family.discriminator(cfg).double()
    for name, network in (("generator", generator), ("discriminator", critic)):
        network.load_state_dict({key: value.double() for key, value in family.rename(name, pair).items()})
    miner = nn.Sequential(nn.Linear(int(golden.metadata["miner_in"]), cfg.z_dim), nn.ReLU())
    miner.append(nn.Linear(cfg.z_dim, cfg.z_dim)).double()
    for layer, name in ((miner[0], "Input1"), (miner[2], "Input2")):
        layer.load_state_dict({"weight": state[f"{prefix}{name}.W"].t(), "bias": state[f"{prefix}{name}.b"]})
    z = miner(golden.get("in.u").double())
    images = generator(z)
    maps = dict(zip(("out.d1", "out.d2", "out.d3"), critic.features(images), strict=True))
    # The published images are those of a sigmoid, in [0, 1].
    return maps | {"out.z_mined": z, "out.img": (images + 1) / 2, "out.score": critic(images)}


def adam(golden: GoldenFile) -> dict[str, Tensor]:
    """Parameters after each step; the hyperparameters are those of the two publications."""
    gradients, results = golden.get("in.grads").double(), {}
    start = golden.get("in.theta0").double()
    for name, lr, betas in (("transfergan", 1e-5, (0.0, 0.9)), ("mnist", 1e-4, (0.5, 0.9))):
        for rule in ("tf", "torch"):
            theta = nn.Parameter(start.clone())
            optimizer = torch.optim.Adam([theta], lr=lr, betas=betas, eps=1e-8, fused=True)
            trace = []
            for step, gradient in enumerate(gradients, 1):
                if rule == "tf":
                    tf_epsilon(optimizer.param_groups[0], step)
                theta.grad = gradient.clone()
                optimizer.step()
                trace.append(theta.detach().clone())
            results[f"out.{name}.{rule}"] = torch.stack(trace)
    return results


def published_losses(golden: GoldenFile) -> dict[str, Tensor]:
    results = {}
    for theirs, ours in (("dcgan", "nonsat"), ("hinge", "hinge")):
        real, fake = (golden.get(f"in.logit_{name}").double().requires_grad_() for name in ("real", "fake"))
        loss = losses.ADVERSARIAL[ours]
        d_real, d_fake, g = loss.real(real), loss.fake(fake), loss.generator(fake)
        results |= {f"out.{theirs}.d_real": d_real, f"out.{theirs}.d_fake": d_fake, f"out.{theirs}.g": g}
        d_wrt_real, d_wrt_fake = torch.autograd.grad(d_real + d_fake, (real, fake))
        results |= {f"grad.{theirs}.d_wrt_real": d_wrt_real, f"grad.{theirs}.d_wrt_fake": d_wrt_fake}
        results[f"grad.{theirs}.g_wrt_fake"] = torch.autograd.grad(g, fake)[0]
    return results


def _gradients(prefix: str, parameters: Mapping[str, Tensor], total: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        total, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return {f"{prefix}.{name}": gradient for name, gradient in zip(parameters, found, strict=True)}


def _published(
    rename: Callable[[str, State], State], name: str, state: State, network: nn.Module, total: Tensor
) -> dict[str, Tensor]:
    """Derivatives by the published variables: those by the network's parameters, taken back through ``rename``."""
    ours = _gradients(name, dict(network.named_parameters()), total)
    theirs = {key: value.double().requires_grad_() for key, value in state.items()}
    renamed = {key: value for key, value in rename(name, theirs).items() if f"{name}.{key}" in ours}
    heads = [ours[f"{name}.{key}"] for key in renamed]
    found = torch.autograd.grad(list(renamed.values()), list(theirs.values()), heads, allow_unused=True)
    return {key: value for key, value in zip(theirs, found, strict=True) if value is not None}
