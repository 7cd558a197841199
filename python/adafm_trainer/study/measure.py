"""What is read off finished runs: metrics, classes of samples, probabilities of sources, unchanged weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..data.grid import to_uint8
from ..models.source import load_pair
from ..trainer.checkpoint import load_checkpoint
from ..trainer.load import load_run
from ..trainer.sampling import generate
from .classifier import Classifier

# The estimate of each source's probability, in a checkpoint of several mined sources.
PROBABILITY = "generator.p"
# 97.5 % points of Student's distribution with 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def summary(values: Sequence[float], share: bool = False) -> dict:
    """Values over the seeds with their median and mean; ``low`` and ``high``: Student's 95 % interval of the mean, that
    of a ``share`` cut at 0 and 1.

    Values that are not there (None, of a run that diverged or did not get there) are counted in ``missing``: the mean
    is of the others, and has no interval, which would leave out the worst. An interval needs two values.
    """
    found = [value for value in values if value is not None]
    result = {"values": list(values), "missing": len(values) - len(found)}
    if not found:
        return {**result, "median": None, "mean": None, "low": None, "high": None}
    if len(found) > len(_STUDENT) + 1:
        raise ValueError(f"{len(found)} seeds; intervals are known for up to {len(_STUDENT) + 1}")
    mean, low, high = math.fsum(found) / len(found), None, None
    if len(found) > 1 and len(found) == len(values):
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1))
        half = _STUDENT[len(found) - 2] * deviation / math.sqrt(len(found))
        low, high = mean - half, mean + half
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
    median = float(torch.tensor(found, dtype=torch.float64).quantile(0.5))
    return {**result, "median": median, "mean": mean, "low": low, "high": high}


def metric(row: dict, name: str) -> float:
    """The value of the metric ``name`` whatever its protocol, of one row of metrics.jsonl; ValueError without it."""
    for full, entry in row["metrics"].items():
        if full.partition("[")[0] == name:
            return entry["value"]
    raise ValueError(f"no metric {name} among {', '.join(row['metrics'])}")


def metric_name(row: dict, name: str) -> str:
    """The metric's name with its protocol."""
    return next(full for full in row["metrics"] if full.partition("[")[0] == name)


def class_shares(folder: Path, classifier: Classifier, count: int) -> list[float]:
    """Shares of the ten digits among ``count`` samples of a run's averaged generator."""
    loaded = load_run(folder, "cpu")
    images = generate(loaded.generator, loaded.config.seed, "study", range(count), autocast=loaded.autocast)
    found = classifier(to_uint8(images / loaded.config.data_scale))
    return (torch.bincount(found, minlength=10).double() / count).tolist()


def probabilities(folder: Path) -> dict[int, list[float]]:
    """p of each source by step, at every checkpoint that a run keeps."""
    found = sorted((folder / "checkpoints").glob("step*/model.safetensors"))
    return {int(path.parent.name.removeprefix("step")): load_file(path)[PROBABILITY].tolist() for path in found}


def changed(folder: Path, sources: Sequence[Path]) -> dict:
    """Tensors of the sources' generators that are not bit for bit in a mining run's newest checkpoint.

    Returns how many were compared, how many of them are buffers, the bytes, and the names that differ.
    """
    _, model, average, _ = load_checkpoint(folder / "checkpoints")
    result = {"tensors": 0, "buffers": 0, "bytes": 0, "differing": []}
    parameters = {name for name, _ in load_run(folder, "cpu").generator.named_parameters()}
    for k, source in enumerate(sources):
        pair = load_pair(source)
        prefix = "generator." if len(sources) == 1 else f"generators.{k}."
        for name, value in (pair.average_state or pair.generator_state).items():
            result["tensors"] += 1
            result["buffers"] += prefix + name not in parameters
            result["bytes"] += value.numel() * value.element_size()
            for state, key in ((model, f"generator.{prefix}{name}"), (average, prefix + name)):
                if not _same_bits(state[key], value):
                    result["differing"].append(key)
    return result


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((_bytes(a) == _bytes(b)).all())


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)
