"""The first iteration of a configuration held to that of ours in float32, before anything of it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adafm_kernels.nn import AdaFMConv2d

from ..methods.base import Networks
from ..methods.losses import gradient_penalty, real_loss
from .case import CheckError
from .step_authors import one_by_one
from .step_cases import Start
from .step_ways import Run, TrainerRun

# Largest error in float32. In bfloat16: that of the authors' code under autocast, which is what eager PyTorch makes of
# the type, and of the others as a multiple of it (at least of SMALLEST).
FLOAT32, AUTOCAST, MULTIPLE, SMALLEST = 1e-4, 0.3, 2.0, 0.03
# A single tensor may be a sum that cancels: under autocast its error says nothing by itself.
WORST, FLOAT32_WORST, NEGLIGIBLE = "worst tensor", 0.02, 0.01


Keep = Callable[[str, dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class First:
    """Losses of the first iteration and its gradients by network and name."""

    losses: dict[str, float]
    gradients: dict[str, dict[str, Tensor]]


def first_iteration(run: Run, keep: Keep | None = None) -> First:
    """One whole iteration, penalised, and what it left: the gradients are copies, or what ``keep`` makes of them."""
    keep = keep or _copied
    loss_g = float(run.generator())
    gradients = {"generator": keep("generator", _gradients(run.networks.generator))}
    run.average()
    loss_d = float(run.discriminator(True))
    gradients["discriminator"] = keep("discriminator", _gradients(run.networks.discriminator))
    return First({"generator": loss_g, "discriminator": loss_d}, gradients)


def compare(found: First, expected: First, start: Start, who: str) -> dict[str, float]:
    """Relative errors: of both losses, of both networks' gradients as a whole, and the largest of a single tensor.

    Compared are the gradients of all parameters that the expected ones know; CheckError where one is not there. A plain
    weight in the place of a modulated one is compared by what its gradient makes of gamma and beta.
    """
    errors = {}
    for network, state in (("generator", start.generator), ("discriminator", start.discriminator)):
        mine, theirs = _as_modulated(found.gradients[network], state), expected.gradients[network]
        if missing := sorted(theirs.keys() - mine.keys()):
            raise CheckError(f"{who}: the {network} has no gradient of {', '.join(missing[:3])}")
        distances = {name: (mine[name].double() - theirs[name].double()).square().sum().item() for name in theirs}
        lengths = {name: gradient.double().square().sum().item() for name, gradient in theirs.items()}
        errors[f"{network} gradients"] = (sum(distances.values()) / sum(lengths.values())) ** 0.5
        errors[f"{network}, {WORST}"] = max(_relative(distances, lengths))
        loss = expected.losses[network]
        errors[f"{network} loss"] = abs(found.losses[network] - loss) / abs(loss)
    return errors


def _relative(distances: dict[str, float], lengths: dict[str, float]) -> list[float]:
    """Errors of single tensors, from squares. The gradient of a bias in front of a normalisation is zero but for
    rounding, so a length counts as at least a share NEGLIGIBLE of the longest in the same layer."""
    longest: dict[str, float] = {}
    for name, length in lengths.items():
        layer = name.rpartition(".")[0]
        longest[layer] = max(longest.get(layer, 0.0), length)
    floors = {name: max(length, NEGLIGIBLE**2 * longest[name.rpartition(".")[0]]) for name, length in lengths.items()}
    return [(distances[name] / floor) ** 0.5 for name, floor in floors.items() if floor]


def judge(errors: dict[str, float], dtype: str, autocast: dict[str, float] | None, who: str) -> None:
    """Raise CheckError where an error is beyond what ``dtype`` allows.

    ``autocast``: errors of the authors' code under autocast, what eager PyTorch makes of the type; None: not known.
    """
    for what, error in errors.items():
        allowed = FLOAT32_WORST if what.endswith(WORST) else FLOAT32
        if dtype == "bfloat16":
            if autocast is None and what.endswith(WORST):
                continue
            allowed = AUTOCAST if autocast is None else MULTIPLE * max(autocast[what], SMALLEST)
        if not error <= allowed:
            raise CheckError(f"{who}: {what} off by {error:.3g} of ours in float32, allowed are {allowed:.3g}")


def _gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    found = network.named_parameters()
    return {name: p.grad.detach() for name, p in found if p.grad is not None}


def _copied(network: str, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient.to("cpu", copy=True) for name, gradient in gradients.items()}


def _as_modulated(gradients: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    made = dict(gradients)
    for name, gradient in gradients.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and f"{layer}.gamma" in state and f"{layer}.gamma" not in gradients:
            wide = gradient.to(state[name].dtype)
            made[f"{layer}.gamma"] = (wide * state[name]).sum((2, 3), keepdim=True)
            made[f"{layer}.beta"] = wide.sum((2, 3), keepdim=True)
    return made


def same_bits(run: TrainerRun) -> dict[str, int]:
    """Gradients of D after the reals' loss and penalty: how many the authors' order leaves bit for bit as ours does.

    The same loss and penalty in both orders, so that nothing but the order differs.
    """
    network = run.networks.discriminator
    run.real_pass()
    merged = _copied("discriminator", _gradients(network))
    network.zero_grad(set_to_none=True)
    logits, images = run.judge_reals()
    weight = run.step.config.reg_param * run.step.config.reg_interval
    one_by_one(real_loss(logits), lambda: weight * gradient_penalty(logits, images).mean())
    apart = _gradients(network)
    network.zero_grad(set_to_none=True)
    return {"equal": sum(torch.equal(merged[name], apart[name].cpu()) for name in merged), "of": len(merged)}


def networks_bytes(networks: Networks, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes of every W' in ``dtype``, and of gamma and beta with gradient, two moments of Adam and, in G, average."""
    weights = state = 0
    for network, kept in ((networks.generator, 5), (networks.discriminator, 4)):
        for layer in network.modules():
            if isinstance(layer, AdaFMConv2d):
                weights += layer.weight.numel() * (dtype or layer.weight.dtype).itemsize
                state += kept * sum(p.numel() * p.element_size() for p in (layer.gamma, layer.beta))
    return {"weights": weights, "state": state}
