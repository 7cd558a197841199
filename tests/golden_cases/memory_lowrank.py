"""Cases of GAN memory's low-rank storage: memory_lowrank and memory_lowrank_penalty."""

from __future__ import annotations

import torch
from adafm_trainer.models.memory_lowrank import Components, LowRankConv2d, rank_penalty, store
from torch import Tensor, nn

from .compare import GoldenFile

OURS = {"gamma": "style_gama", "beta": "style_beta"}


def accumulation(golden: GoldenFile) -> dict[str, Tensor]:
    """Tasks of one convolution, trained and stored one after the other."""
    x, weight, bias = golden.get("in.x"), golden.get("in.W"), golden.get("in.bias")
    results: dict[str, Tensor] = {}
    found = {name: Components.empty(weight) for name in OURS}
    for t in range(golden.config["tasks"] + 1):
        task = golden.under(f"in.task{t}.")
        # As if training had changed the weights of what is stored.
        found = {name: Components(c.u, c.s * task["s_scale"], c.v) for name, c in found.items()}
        results[f"out.task{t}.y_training"] = _layer(weight, bias, found, task["b"], task)(x)
        if f"out.task{t}.y_recalled" not in golden.expected:
            continue
        for name, theirs in OURS.items():
            found[name], count = store(task[theirs], found[name])
            results[f"out.task{t}.num_{name}"] = torch.tensor(count)
            results[f"out.task{t}.s_{name}"] = found[name].s
        results[f"out.task{t}.y_recalled"] = _layer(weight, bias, found, task["b"], {})(x)
    return results


def penalty(golden: GoldenFile) -> dict[str, Tensor]:
    names = [key for key in golden.tensors if key.startswith("in.")]
    matrices = {key.removeprefix("in."): golden.get(key).requires_grad_() for key in names}
    total = sum(rank_penalty(m for name, m in matrices.items() if name.startswith(kind)) for kind in OURS.values())
    gradients = torch.autograd.grad(total, list(matrices.values()))
    named = {f"out.grad.{name}": gradient for name, gradient in zip(matrices, gradients, strict=True)}
    return {"out.reg": total, **named}


def _layer(
    weight: Tensor, bias: Tensor, found: dict[str, Components], shift: Tensor, residual: dict[str, Tensor]
) -> LowRankConv2d:
    plain = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=1, dtype=weight.dtype)
    plain.load_state_dict({"weight": weight, "bias": bias})
    layer = LowRankConv2d(plain, *(len(found[name].s) for name in OURS))
    layer.put(found["gamma"], found["beta"], shift)
    for name, theirs in OURS.items():
        if theirs in residual:
            getattr(layer, name).data.copy_(residual[theirs].view_as(getattr(layer, name)))
    return layer
