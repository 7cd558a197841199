"""Which second derivative the penalised pass takes: PyTorch's own convolutions, or those of ``models.convolution``."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..methods.losses import gradient_penalty, real_loss
from ..methods.step_config import StepConfig
from ..models.convolution import ExplicitDoubleBackward

FORMS = ("native", "explicit")
_WARM, _ROUNDS = 2, 5


def choose_double_backward(wanted: str, network: nn.Module, images: Tensor, config: StepConfig) -> tuple[str, str]:
    """One of FORMS, and a line for the log that says why.

    ``auto`` measures both on ``images [B, C, H, W]`` where they lie on CUDA. On the CPU it is explicit, always, so that
    two runs of the same settings are alike; `adafm bench step` has the times of both.
    """
    if wanted != "auto":
        return wanted, f"second derivative of D's convolutions: {wanted}, as asked"
    if images.device.type != "cuda":
        return "explicit", f"second derivative of D's convolutions: explicit, the rule on {images.device.type}"
    times = measure_forms(network, images, config)
    fastest = min(times, key=times.__getitem__)
    listed = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in times.items())
    return fastest, f"second derivative of D's convolutions: {fastest} (penalised pass, measured: {listed})"


def measure_forms(network: nn.Module, images: Tensor, config: StepConfig) -> dict[str, float]:
    """Seconds of D's penalised pass by form: medians of alternating rounds after a warm-up.

    No gradient of a parameter is touched and no random number drawn.
    """
    rounds: dict[str, list[float]] = {name: [] for name in FORMS}
    for number in range(_WARM + _ROUNDS):
        for name, seconds in rounds.items():
            spent = _seconds(network, images, config, name == "explicit")
            if number >= _WARM:
                seconds.append(spent)
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def _seconds(network: nn.Module, images: Tensor, config: StepConfig, explicit: bool) -> float:
    _wait(images.device)
    start = time.perf_counter()
    x, dtype = images.detach().requires_grad_(), config.reg_autocast
    with torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        with ExplicitDoubleBackward() if explicit else nullcontext():
            logits = network(x)
    total = real_loss(logits) + gradient_penalty(logits, x).mean()
    torch.autograd.grad(total, [p for p in network.parameters() if p.requires_grad], allow_unused=True)
    _wait(images.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
