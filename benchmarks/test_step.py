"""The demo's training steps under pytest-benchmark; `adafm bench step` pairs and shuffles the same cases for ratios."""

from __future__ import annotations

import pytest
from adafm_trainer.bench.step import CONFIGURATIONS, PHASES, Steps
from adafm_trainer.trainer.demo import BATCH

_MEASURED = {name: precision for name, precision in CONFIGURATIONS.items() if "control" not in name}


@pytest.fixture(scope="module", params=list(_MEASURED))
def steps(request):
    return Steps(_MEASURED[request.param], batch=BATCH)


@pytest.mark.parametrize("phase", PHASES)
def test_step(benchmark, steps, phase):
    benchmark.pedantic(steps.run, args=(phase,), rounds=5, warmup_rounds=1)
    assert benchmark.stats["median"] > 0
