"""Golden files: every known file in the folder is recomputed from its inputs and compared key by key.

The folder is ``tests/golden`` or ``$ADAFM_GOLDEN_DIR``; files of other sizes and seeds need no change here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_cases import (
    biggan,
    layers,
    memory,
    memory_lowrank,
    memory_networks,
    metrics,
    mining,
    networks,
    selecting,
    training,
    transfergan,
)
from golden_cases.backends import BACKENDS, on_backend
from golden_cases.compare import SENSITIVE_ABOVE, GoldenFile, differences
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(os.environ.get("ADAFM_GOLDEN_DIR") or Path(__file__).parent / "golden")
CASES: dict[str, Callable[[GoldenFile], dict[str, Tensor]]] = {
    "adafm_layer_": layers.adafm_layer,
    "block_plain_": layers.block,
    "block_adafm_": layers.block,
    "head_": layers.head,
    "gpgan_": networks.gpgan,
    "adafm_generator": networks.adafm_generator,
    "train_": training.train,
    "frechet": networks.frechet,
    "block_memory_": memory_networks.block,
    "memory_modulation": memory.modulation,
    "biggan_g_": biggan.generator,
    "biggan_d_": biggan.discriminator,
    "biggan_sn": biggan.spectral_norm,
    "minegan_biggan_miner": mining.biggan_miner,
    "minegan_biggan_step": mining.biggan_step,
    "minegan_biggan_trajectory": mining.biggan_trajectory,
    "minegan_style_miners": mining.style_miners,
    "minegan_transfergan_": transfergan.transfergan,
    "minegan_wgan_gp_mlp": transfergan.wgan_gp_mlp,
    "minegan_mnist_nets": transfergan.mnist_nets,
    "minegan_adam": transfergan.adam,
    "minegan_multi_select": selecting.multi_select,
    "biggan_losses": transfergan.published_losses,
    "memory_generator_classcond": memory_networks.classes,
    "memory_generator_multitask": memory_networks.multitask,
    "memory_generator": memory_networks.unconditional,
    "memory_lowrank_penalty": memory_lowrank.penalty,
    "memory_lowrank": memory_lowrank.accumulation,
    "minegan_metrics": metrics.minegan_metrics,
}
# Cases with modulated layers run once on each backend of the op.
MODULATED = ("adafm_layer_", "block_adafm_", "adafm_generator", "train_adafm_", "block_memory_", "memory_")


def _parameters() -> list:
    listed = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        if not path.stem.startswith(MODULATED):
            listed.append(pytest.param(path, "any", id=path.stem))
            continue
        for backend in BACKENDS:
            marks = [pytest.mark.triton] if backend == "triton" else []
            listed.append(pytest.param(path, backend, id=f"{path.stem}-{backend}", marks=marks))
    return listed


@functools.cache
def _compute(path: Path, backend: str) -> tuple[GoldenFile, dict[str, Tensor]]:
    golden = GoldenFile(path)
    case = next((case for prefix, case in CASES.items() if path.stem.startswith(prefix)), None)
    if case is None:
        pytest.fail(f"{path.name}: unknown prefix; known are {', '.join(CASES)}")
    with on_backend(backend):
        return golden, case(golden)


def test_the_folder_exists() -> None:
    assert FOLDER.is_dir(), f"{FOLDER} is not a folder; ADAFM_GOLDEN_DIR must name one"


@pytest.mark.parametrize(("path", "backend"), _parameters())
def test_golden(path: Path, backend: str) -> None:
    golden, actual = _compute(path, backend)
    assert not (problems := differences(golden.expected, actual, golden.tolerances)), "\n".join(problems)
    assert not golden.unread, f"inputs that no computation reads: {golden.unread}"


@pytest.mark.parametrize(("path", "backend"), _parameters())
def test_a_change_of_one_percent_is_seen(path: Path, backend: str) -> None:
    golden, actual = _compute(path, backend)
    unseen = []
    for key, want in golden.expected.items():
        if not want.is_floating_point() or not want.numel() or want.abs().max() <= SENSITIVE_ABOVE:
            continue
        for factor in (0.99, 1.01):
            reported = differences({key: want * factor}, actual, golden.tolerances)
            if len(reported) != 1:
                unseen.append(f"{key} x {factor}")
    assert not unseen


def test_a_key_that_nothing_computes_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "head_small_H_extra.safetensors"
    save_file({"in.x": torch.ones(2), "in.unused": torch.ones(1), "out.more": torch.ones(1)}, path)
    golden = GoldenFile(path)
    golden.get("in.x")
    assert golden.unread == ["in.unused"]
    assert differences(golden.expected, {"out.y": torch.ones(1)}) == ["out.more: nothing computes this key"]


def test_an_unknown_prefix_fails(tmp_path: Path) -> None:
    path = tmp_path / "surprise_1.safetensors"
    save_file({"in.x": torch.ones(1)}, path)
    with pytest.raises(pytest.fail.Exception, match="unknown prefix"):
        _compute(path, "any")
