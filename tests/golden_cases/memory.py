"""Cases of GAN memory: memory_modulation, a fully connected layer and a residual block with normalised weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from adafm_trainer.models.blocks import lrelu
from torch import Tensor

from .compare import GoldenFile
from .layers import penalty

BLOCK = "resnet_0_0."
# Each modulated weight with its gamma and beta, and the dimensions that its mean and deviation are taken over.
WEIGHTS = {
    "fc.weight": ("AdaFM_fc.gamma", "AdaFM_fc.beta", "channel"),
    f"{BLOCK}conv_0.weight": (f"{BLOCK}AdaFM_0.style_gama", f"{BLOCK}AdaFM_0.style_beta", "filter"),
    f"{BLOCK}conv_1.weight": (f"{BLOCK}AdaFM_1.style_gama", f"{BLOCK}AdaFM_1.style_beta", "filter"),
}


def modulation(golden: GoldenFile) -> dict[str, Tensor]:
    """Both ways to the same numbers: weights normalised once and then modulated, and both at once from the raw ones."""
    x, v = golden.get("in.x").requires_grad_(), golden.get("in.v_in").requires_grad_()
    raw, task = golden.under("in.raw."), golden.under("in.task.")
    norm = _normalized(raw)
    results = {f"out.norm.{name}": tensor for name, tensor in norm.items()}
    results |= {"out.raw.y_fc": _linear(raw, v, at_once=False), "out.raw.y": _block(raw, x, at_once=False)}
    statistics = {name: norm[name] for pair in WEIGHTS.values() for name in pair[:2]}
    results["out.norm.y_fc"] = _linear(raw | statistics, v, at_once=True)
    results["out.norm.y"] = _block(raw | statistics, x, at_once=True)
    results["out.task.y_fc"] = _linear(raw | task, v, at_once=True)
    results["out.task.y"] = _block(raw | task, x, at_once=True)

    state = {name: tensor.detach().requires_grad_() for name, tensor in (norm | task).items()}
    block = {name: tensor for name, tensor in state.items() if name.startswith(BLOCK)}
    y_fc, y = _linear(state, v, at_once=False), _block(state, x, at_once=False)
    names = {"v_in": v, "x": x, **state}
    heads = (golden.get("in.gy_fc"), golden.get("in.gy"))
    found = torch.autograd.grad((y_fc, y), list(names.values()), heads, retain_graph=True)
    results |= {f"out.grad.{name}": gradient for name, gradient in zip(names, found, strict=True)}
    return results | penalty(golden, y, x, block)


def _normalized(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state whose weights have mean 0 and deviation 1, and whose gamma and beta are what was taken out."""
    from adafm_kernels import modulate_normalized

    state = dict(raw)
    for name, (gamma, beta, over) in WEIGHTS.items():
        weight = raw[name]
        dims = (1,) if over == "channel" else (2, 3)
        state[name] = modulate_normalized(weight, None, None, over=over)
        state[gamma] = weight.std(dims, keepdim=True).reshape(raw[gamma].shape)
        state[beta] = weight.mean(dims, keepdim=True).reshape(raw[beta].shape)
    return state


def _weight(state: Mapping[str, Tensor], name: str, at_once: bool) -> Tensor:
    """The modulated weight; ``at_once`` from a weight that is not yet normalised."""
    from adafm_kernels import modulate, modulate_normalized

    gamma_name, beta_name, over = WEIGHTS[name]
    gamma, beta = state[gamma_name], state[beta_name]
    if over == "channel":
        gamma, beta = gamma.t(), beta.t()
    if at_once:
        return modulate_normalized(state[name], gamma, beta, over=over)
    return modulate(state[name], gamma, beta)


def _linear(state: Mapping[str, Tensor], v: Tensor, at_once: bool) -> Tensor:
    return F.linear(v, _weight(state, "fc.weight", at_once), state["fc.bias"] + state["AdaFM_fc_b"])


def _block(state: Mapping[str, Tensor], x: Tensor, at_once: bool) -> Tensor:
    hidden = x
    for n in (0, 1):
        bias = state[f"{BLOCK}conv_{n}.bias"] + state[f"{BLOCK}AdaFM_b{n}"]
        hidden = F.conv2d(lrelu(hidden), _weight(state, f"{BLOCK}conv_{n}.weight", at_once), bias, padding=1)
    return F.conv2d(x, state[f"{BLOCK}conv_s.weight"]) + 0.1 * hidden
