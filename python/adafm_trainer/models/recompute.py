"""Activation checkpointing: a network's stages keep their inputs only and are computed again in the backward pass.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016); PyTorch's non-reentrant form.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .convolution import convolution_mode

T = TypeVar("T")

_SECOND: ContextVar[bool] = ContextVar("second run of a stage", default=False)


def second_run() -> bool:
    """Whether a stage is being computed again for its backward pass: buffers have had their update and must stay."""
    return _SECOND.get()


def run_stage(network: nn.Module, stage: Callable[..., T], *args: object) -> T:
    """``stage(*args)``, saving nothing but ``args`` for backward where ``network.checkpoint_activations`` is true.

    Results and gradients, of any order, are bit for bit those without checkpointing: the stage runs a second time (and
    once more for each further backward pass through it) under the autocast state of the first. ``stage`` must draw no
    random numbers: their state is neither kept nor restored, and a stage that draws them gets wrong gradients. Noise
    is therefore an argument. A gradient taken with ``create_graph`` saves the maps that it computed again, so a second
    differentiation saves no memory by this; it is correct all the same.
    """
    if not (network.checkpoint_activations and torch.is_grad_enabled()):
        return stage(*args)
    # The second run must save what the first would have saved: the same form of the convolutions.
    again = _SecondRun(convolution_mode())
    return checkpoint(
        stage, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again)
    )


class _SecondRun(AbstractContextManager):
    """``inner``, with ``second_run`` true inside it; it can be entered again after it was left."""

    def __init__(self, inner: AbstractContextManager) -> None:
        self._inner = inner

    def __enter__(self) -> None:
        self._token = _SECOND.set(True)
        self._inner.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)
        _SECOND.reset(self._token)
