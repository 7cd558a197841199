"""Training steps of the demo's pair under pytest-benchmark; `adafm bench step` pairs and shuffles all of them."""

from __future__ import annotations

import pytest
from adafm_trainer.bench.machine import facts
from adafm_trainer.bench.measure import SECOND
from adafm_trainer.bench.step_cases import cases, make_start
from adafm_trainer.bench.step_child import D_STEP, D_STEP_R1, G_STEP, parts
from adafm_trainer.bench.step_ways import COMPILED, GRAPHED, WAYS, build


@pytest.fixture(scope="module")
def case():
    return next(case for case in cases("cpu", quick=False) if case.name == "demo")


@pytest.fixture(scope="module")
def start(case):
    return make_start(case)


@pytest.fixture(scope="module", params=[way for way in WAYS if way not in (SECOND, COMPILED, GRAPHED)])
def run(request, case, start):
    made = build(case, request.param, "cpu", start)
    made.generator()
    return made


@pytest.mark.parametrize("part", [G_STEP, D_STEP, D_STEP_R1])
def test_step(benchmark, case, run, part):
    found = facts("cpu")
    benchmark.extra_info.update({name: found[name] for name in ("cpu", "cpu_level", "versions", "commit", "dirty")})
    benchmark.extra_info.update(batch=case.batch)
    benchmark.pedantic(parts(run)[part], rounds=5, warmup_rounds=1)
    assert benchmark.stats["median"] > 0
