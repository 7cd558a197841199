"""How many operations a training step launches, and how many of them modulate, reduce, update and average."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .step_authors import AuthorsConv2d
from .step_ways import AuthorsRun, Run

PARTS = ("modulation", "reduction", "optimizer", "average")
# Namespaces of the package's ops; a plan calls those of its backend itself.
_OURS = ("adafm", "adafm_compiled", "adafm_triton")
_FUSED = {"aten::_fused_adam_": "optimizer", "aten::_foreach_lerp_": "average"}
_IDLE = ("aten::empty", "aten::new_empty", "aten::_local_scalar_dense", "profiler::")


class Operators(TorchDispatchMode):
    """Names of the operators that reach a backend while this is active; without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if not _is_view(function) and not name.startswith(_IDLE):
            self.names.append(name.partition(".")[0])
        return function(*args, **(kwargs or {}))


def count(run: Run, device: str) -> dict:
    """Launches of the two steps of one iteration, penalised, and of each network's four parts of it.

    ``total``: on a GPU kernels and copies by the profiler, on a CPU operators that reach a backend; None where compiled
    code hides them. ``parts``: calls. Ours are the package's ops and the fused operators of Adam and of the average, by
    name, of the step outside of CUDA graphs; the authors' parts are run once more by themselves, times how often a step
    runs them.
    """
    steps = {
        "generator": lambda: (run.generator(), run.average()),
        "discriminator": lambda: run.discriminator(True),
    }
    if isinstance(run, AuthorsRun):
        parts = {
            "generator": _alone(run.networks.generator, run.step.opt_g, run.average, (1, 1)),
            # Reals and fakes pass forward; the real loss, the penalty and the fake loss backward.
            "discriminator": _alone(run.networks.discriminator, run.step.opt_d, None, (2, 3)),
        }
        hidden = run.compiled and device == "cpu"
        total = {network: None if hidden else _launches(step, device) for network, step in steps.items()}
    else:
        graphed, run.step = run.step, run.eager
        # Each network is modulated when it is first used after its update: D in the step of G. Here each in its own.
        run.generator()
        with run.step.D.at_rest():
            parts = {"generator": named_calls(operators(steps["generator"]))}
        run.discriminator(True)
        parts["discriminator"] = named_calls(operators(steps["discriminator"]))
        run.step = graphed
        total = {network: _launches(step, device) for network, step in steps.items()}
    return {"total": total, "parts": parts}


def operators(run: Callable) -> list[str]:
    """Names of the operators that ``run`` sends to a backend."""
    with Operators() as found:
        run()
    return found.names


def named_calls(names: Iterable[str]) -> dict[str, int]:
    """Calls by part, of operators' names."""
    found = dict.fromkeys(PARTS, 0)
    for name in names:
        part = _FUSED.get(name)
        namespace, _, op = name.partition("::")
        if namespace in _OURS:
            part = "optimizer" if op.startswith(("step", "adam")) else "reduction" if "backward" in op else "modulation"
        if part is not None:
            found[part] += 1
    return found


def _alone(
    network: nn.Module, optimizer: torch.optim.Optimizer, average: Callable[[], None] | None, passes: tuple[int, int]
) -> dict[str, int]:
    layers = [layer for layer in network.modules() if isinstance(layer, AuthorsConv2d)]
    pairs = [parameter for layer in layers for parameter in (layer.gamma, layer.beta)]
    found = dict.fromkeys(PARTS, 0)
    if layers:
        for parameter in pairs:
            parameter.requires_grad_(True)
        weights = [layer.modulated() for layer in layers]
        grads = [torch.ones_like(weight) for weight in weights]
        found["modulation"] = passes[0] * len(operators(lambda: [layer.modulated() for layer in layers]))
        found["reduction"] = passes[1] * len(operators(lambda: torch.autograd.grad(weights, pairs, grads)))
    found["optimizer"] = len(operators(optimizer.step))
    if average is not None:
        found["average"] = len(operators(average))
    return found


def _launches(run: Callable, device: str) -> int:
    if device == "cpu":
        return len(operators(run))
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in found.events())


def _is_view(function) -> bool:
    aliases = [result.alias_info for result in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
