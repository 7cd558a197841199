"""What a run writes down before its first step: its networks, device, data and where they came from."""

from __future__ import annotations

import json

import torch

from adafm_kernels import which_backend
from adafm_kernels.backends import OPS

from ..methods.base import Networks
from ..methods.config import TrainConfig
from ..models.source import SourcePair
from ..models.transfer import block_table, format_block_table
from .assemble import Assembly
from .checkpoint import write_atomic
from .loop import write_blocks
from .progress import Console
from .run_data import Data
from .rundir import RunDirectory


def write_description(
    run: RunDirectory,
    console: Console,
    assembly: Assembly,
    config: TrainConfig,
    data: Data,
    sources: tuple[SourcePair, ...],
) -> None:
    """blocks.json, data_manifest.json, environment.json, and the same for the reader of the log."""
    networks: Networks = assembly.networks
    rows = block_table(networks.generator, networks.discriminator, networks.model)
    write_blocks(run.root / "blocks.json", rows)
    console.line(format_block_table(rows))
    compute = "float32" if assembly.autocast is None else str(assembly.autocast).removeprefix("torch.")
    console.line(f"device {assembly.device}, compute type {compute}, {torch.get_num_threads()} threads")
    for remark in assembly.remarks:
        console.line(remark)
    parallel = assembly.parallel
    if parallel.grouped:
        each = len(parallel.samples(config.batch))
        console.line(f"{parallel.world} processes, each with {each} of the {config.batch} images of a step")
    manifest = {"training": data.training.manifest, "evaluation": None, "split": data.split}
    if data.reals is not None and data.reals is not data.training:
        manifest["evaluation"] = data.reals.manifest
    write_atomic(run.root / "data_manifest.json", json.dumps(manifest, indent=1))
    run.write_environment(
        {
            "device": str(assembly.device),
            "processes": parallel.world,
            "compute": compute,
            "backends": {op: which_backend(op, assembly.device).name for op in OPS},
            "sources": [source.meta for source in sources],
        }
    )
