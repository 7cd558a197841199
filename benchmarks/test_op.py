"""The ops under pytest-benchmark on the CPU; `adafm bench op` pairs and shuffles the same cases for ratios.

``extra_info`` of each: bytes that have to be moved, the time of a copy of as many bytes, and this way's time over ours,
the last two from a short paired measurement in this process.
"""

from __future__ import annotations

import math

import pytest
import torch
from adafm_trainer.bench import layer_cases, network_cases, shapes
from adafm_trainer.bench.baselines import AUTHORS, BROADCAST, COMPILE, COMPILE_PACKED
from adafm_trainer.bench.case import Compiling, Setup
from adafm_trainer.bench.machine import facts
from adafm_trainer.bench.measure import COPY, OURS, CpuClock, measure, summarise

SETUP = Setup("cpu", False, Compiling("cpu"))
ROUNDS, SECONDS = 11, 0.3
_LAYERS = [(row, shape) for shape in shapes.mean_shapes() for row in layer_cases.ROWS]
_NETWORKS = [(row, name) for name in ("G128", "G256") for row in network_cases.ROWS]


def _name(place) -> str:
    row, where = place
    return f"{row}-{where if isinstance(where, str) else shapes.text(where)}".replace(" ", "-")


@pytest.fixture(scope="module", params=[*_LAYERS, *_NETWORKS], ids=_name)
def case(request):
    row, where = request.param
    torch._dynamo.reset()
    build = network_cases.network_case if row in network_cases.ROWS else layer_cases.layer_case
    built = build(SETUP, row, where)
    built.check()
    paired, _ = summarise(measure(built.methods, CpuClock(), ROUNDS, SECONDS), built.moved)
    return built, paired


@pytest.fixture(scope="session")
def where():
    found = facts("cpu")
    return {name: found[name] for name in ("cpu", "cpu_level", "versions", "commit", "dirty")}


@pytest.mark.parametrize("way", [OURS, AUTHORS, BROADCAST, COMPILE, COMPILE_PACKED, COPY])
def test_op(benchmark, case, where, way):
    built, paired = case
    method = next((method for method in built.methods if method.name == way), None)
    if method is None:
        pytest.skip(f"{way} is not among the ways to compute this case")
    calls = max(1, math.ceil(1e-3 / (paired["methods"][way]["median_us"] / 1e6)))
    benchmark.extra_info.update(
        where,
        threads=torch.get_num_threads(),
        bytes=built.moved,
        floor_us=paired["methods"][COPY]["median_us"],
        ratio_to_ours=1.0 if way == OURS else paired["ratios"][way]["median"],
        accepted=paired["accepted"],
    )
    benchmark.pedantic(method.run, rounds=10, iterations=calls, warmup_rounds=1)
    assert benchmark.stats["median"] > 0
