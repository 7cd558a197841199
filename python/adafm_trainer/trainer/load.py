"""A finished or interrupted run as a generator that makes pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..methods import method_by_name
from ..methods.config import TrainConfig
from ..methods.config_file import read_config
from ..models.architecture import Description
from ..models.catalogue import describe
from .checkpoint import load_checkpoint
from .precision import resolve_autocast, resolve_device, resolve_layout
from .rundir import RunDirectory


@dataclass
class LoadedRun:
    """The averaged generator of a run's newest checkpoint, on its device, ready to be called."""

    generator: nn.Module
    config: TrainConfig
    model: Description
    step: int
    autocast: torch.dtype | None


def load_run(folder: str | Path, device: str = "auto") -> LoadedRun:
    """Read the newest whole checkpoint of ``folder``.

    Raises:
        UsageError: no run or no whole checkpoint there.
    """
    run = RunDirectory(folder)
    run.open_existing()
    method_name, config, described = read_config(run.config)
    model = describe(described)
    _, _, average, trainer = load_checkpoint(run.checkpoints)
    generator = method_by_name(method_name).structure(model, config).generator
    generator.load_state_dict(average)
    generator.sample_classes = model.classes if config.labels == "folders" else 0
    target = resolve_device(device)
    autocast = resolve_autocast(config.precision, target)
    generator.to(device=target, memory_format=resolve_layout(config.layout, autocast)).requires_grad_(False).eval()
    return LoadedRun(generator, config, model, trainer["loop"]["step"], autocast)
