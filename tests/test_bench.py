"""The op benchmark: statistics, timing, checks before timing, a small run from end to end, and what is shown of it."""

import json
import math
import os
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from adafm_trainer.bench import op, op_chart, op_table, shapes
from adafm_trainer.bench.case import Case, CheckError, Compiling, Setup
from adafm_trainer.bench.gpu import GpuClock
from adafm_trainer.bench.measure import (
    COPY,
    LEAST_ROUNDS,
    OURS,
    SECOND,
    CpuClock,
    Method,
    Ratio,
    Samples,
    control_holds,
    geometric_mean,
    measure,
    paired_ratio,
    quantile,
    summarise,
)

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}


def samples(*seconds):
    return Samples(1, list(seconds), list(seconds))


def test_paired_ratio():
    # The rounds differ a hundredfold, the pairs do not: only pairing finds the factor.
    ours = [1.0, 10.0, 100.0, 2.0, 50.0]
    ratio = paired_ratio([3 * t for t in ours], ours)
    assert ratio.median == 3.0
    assert ratio.to_json() == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert paired_ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0]).median == 2.0
    for numerator in ([1.0], []):
        with pytest.raises(ValueError, match="cannot be paired"):
            paired_ratio(numerator, [1.0, 2.0] if numerator else [])


def test_bootstrap_interval():
    chance = random.Random(0)
    noisy = [2.0 + chance.gauss(0, 0.1) for _ in range(50)]
    found = paired_ratio(noisy, [1.0] * 50).to_json()
    assert found["low"] < found["median"] < found["high"]
    # The median of 50 normal draws deviates by 1.25 * 0.1 / sqrt(50) = 0.018.
    assert 0.03 < found["high"] - found["low"] < 0.15
    assert found == paired_ratio(noisy, [1.0] * 50).to_json()


def test_geometric_mean():
    exact = [Ratio(value, np.full(2000, value)) for value in (2.0, 8.0)]
    assert geometric_mean(exact).to_json() == pytest.approx({"median": 4.0, "low": 4.0, "high": 4.0})
    spread = Ratio(1.0, np.exp(np.random.default_rng(0).normal(0, 0.1, 2000)))
    mean = geometric_mean([spread] * 4).to_json()
    # Four independent cases: half the spread of one.
    assert math.log(mean["high"] / mean["low"]) == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    with pytest.raises(ValueError, match="no ratio"):
        geometric_mean([])


def test_quantile():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [quantile(values, q) for q in (0.2, 0.5, 0.8, 1.0)] == [1.0, 3.0, 4.0, 5.0]
    assert quantile([7.0], 0.2) == 7.0


@pytest.mark.parametrize(("ratio", "holds"), [(0.949, False), (0.95, True), (1.0, True), (1.05, True), (1.051, False)])
def test_control(ratio, holds):
    assert control_holds(ratio) is holds
    found, _ = summarise({OURS: samples(1.0, 1.0), SECOND: samples(ratio, ratio), COPY: samples(0.5, 0.5)}, 1000)
    assert found["accepted"] is holds
    assert found["ratios"][COPY]["median"] == 0.5
    assert found["methods"][OURS]["median_us"] == 1e6
    assert found["gbytes_per_second"] == pytest.approx(1e-6)


class FakeClock:
    """Says how long every call takes, and notes the calls."""

    def __init__(self, seconds):
        self.seconds, self.order = seconds, []

    def time(self, run, calls):
        name = run()
        self.order.append((name, calls))
        return self.seconds[name], self.seconds[name]

    def calls(self, seconds):
        return CpuClock().calls(seconds)


def fake_methods(*names):
    return [Method(name, lambda name=name: name) for name in names]


def test_measure_shuffles_and_fills_samples():
    clock = FakeClock({OURS: 50e-6, "slow": 1.0})
    found = measure(fake_methods(OURS, "slow"), clock, rounds=30, budget=1e9)
    assert {name: len(s.wall) for name, s in found.items()} == {OURS: 30, SECOND: 30, "slow": 30}
    assert found[OURS].calls == found[SECOND].calls == 4 and found["slow"].calls == 1
    rounds = [tuple(name for name, _ in clock.order[9 + 3 * k : 12 + 3 * k]) for k in range(30)]
    assert all(sorted(r) == sorted([OURS, OURS, "slow"]) for r in rounds)
    assert len(set(rounds)) == 3


def test_measure_keeps_to_its_budget():
    clock = FakeClock({OURS: 1.0})
    assert len(measure(fake_methods(OURS), clock, 50, budget=40.0)[OURS].wall) == 20
    assert len(measure(fake_methods(OURS), clock, 50, budget=1.0)[OURS].wall) == LEAST_ROUNDS
    assert len(measure(fake_methods(OURS), clock, 3, budget=1.0)[OURS].wall) == 3


def test_cpu_clock_counts_wall_and_processor_time():
    tensor = torch.ones(1 << 20)
    wall, cpu = CpuClock().time(lambda: tensor.mul_(1.0), 20)
    assert 0 < wall < 1 and 0 < cpu < 1


class DriftingClock(CpuClock):
    """Every call takes longer than the one before."""

    def __init__(self):
        self.now = 1.0

    def time(self, run, calls):
        self.now *= 1.5
        return self.now, self.now


def simple_case(*wrong, control=None):
    truth = torch.linspace(1, 2, 8, dtype=torch.float64)
    methods = [Method(OURS, truth.float), *(Method(name, run) for name, run in wrong), Method(COPY, lambda: None)]
    return Case("row", "8", 64, methods, lambda: [truth])


def test_failed_control_is_measured_again_and_marked():
    found, _ = op._measure_case(simple_case(), DriftingClock(), 12, "cpu")
    assert found["attempts"] == op.ATTEMPTS and not found["accepted"]


def test_a_wrong_result_is_an_error():
    simple_case().check()
    off = torch.linspace(1, 2, 8).mul_(1 + 1e-5)
    with pytest.raises(CheckError, match=r"row 8, other: off by 2e-05, allowed are"):
        simple_case(("other", lambda: off)).check()
    with pytest.raises(CheckError, match="off by nan"):
        simple_case(("other", lambda: torch.full((8,), math.nan))).check()
    with pytest.raises(CheckError, match="2 tensors, expected 1"):
        simple_case(("other", lambda: [off, off])).check()


def test_nothing_is_timed_on_a_tree_that_fails(monkeypatch, tmp_path, capsys):
    from adafm_kernels.verify_check import Check

    failed = Check("compiled", "cpu", "modulate", "3x3", "value", 1e6, False)
    monkeypatch.setattr(op, "verify", lambda backend, device: [failed])
    monkeypatch.setattr(op, "measure_cases", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(op, "_in_process", lambda *args: pytest.fail("timed"))
    assert op.main(["--quick", "--json", str(tmp_path / "op.json")]) == 1
    assert "nothing is reported" in capsys.readouterr().err
    assert not (tmp_path / "op.json").exists()


def test_compiling_stops_at_its_limit(monkeypatch):
    monkeypatch.setattr("adafm_trainer.bench.case.compiled", lambda function: function)
    compiling = Compiling("cpu", limit=1.0, spent=0.5)
    monkeypatch.setattr("adafm_trainer.bench.case.cannot_compile", lambda device: None)
    assert [m.name for m in Setup("cpu", True, compiling).compiled_method(lambda: None)] == ["compile"]
    compiling.spent = 1.5
    assert Setup("cpu", True, compiling).compiled_method(lambda: None) == []
    assert compiling.left_out == "limited to 1 s of compiling"


def test_shapes_come_from_generators():
    counted = {name: sum(math.prod(s) for s in shapes.network_layers(name)) for name in shapes.NETWORKS}
    assert counted == {"G128": 3_870_720, "G256": 47_222_784, "D128": 91_164_672}
    assert [len(shapes.network_layers(name)) for name in shapes.NETWORKS] == [12, 14, 24]
    assert [s[:2] for s in shapes.mean_shapes()] == [(64, 64), (128, 256), (256, 512), (1024, 1024)]
    assert all(s[2:] == (3, 3) for s in shapes.mean_shapes())
    assert shapes.listed_shapes()[1][2:] == (1, 1)


def test_profiled_calls_are_told_apart_by_the_flush(monkeypatch):
    clock = object.__new__(GpuClock)
    clock._flush_kernels = {"sinh"}
    events = [("sinh", 1.0), ("a", 2.0), ("b", 3.0)] * 10 + [("sinh", 1.0), ("a", 4.0)] * 10
    monkeypatch.setattr(GpuClock, "_profiled", lambda self, runs: events)
    assert clock.kernels([lambda: None] * 2) == pytest.approx([5.0, 4.0])
    with pytest.raises(RuntimeError, match="saw 20 calls of 30"):
        clock.kernels([lambda: None] * 3)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The result of a small run, by the entry that needs no tyro, in a process that has none."""
    path = tmp_path_factory.mktemp("bench") / "op.json"
    flags = ["--quick", "--threads", "1", "--rounds", "3", "--compile-seconds", "0", "--json", str(path)]
    code = f"import sys; sys.modules['tyro'] = None\nfrom adafm_trainer.bench import op\nsys.exit(op.main({flags}))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@pytest.mark.slow
def test_quick_run(quick):
    path, printed = quick
    result = json.loads(path.read_text())
    assert {case["row"] for case in result["runs"][0]["cases"]} == set(op.ROWS)
    assert result["runs"][0]["threads"] == 1 and result["runs"][0]["complete"]
    assert {"cpu", "commit", "dirty", "versions", "method"} <= set(result)
    for case in result["runs"][0]["cases"]:
        assert {OURS, SECOND, COPY} <= set(case["methods"]) and case["bytes"] > 0
        assert all(m["p20_us"] <= m["median_us"] <= m["p80_us"] and m["cpu_us"] > 0 for m in case["methods"].values())
    assert printed.strip() == op_table.table(result)


@pytest.mark.slow
def test_render_of_a_quick_run(quick, tmp_path):
    path, _ = quick
    command = [sys.executable, "benchmarks/render.py", str(path), "--chart", str(tmp_path / "op.svg")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| share of a copy's speed |" in done.stdout and op_table.NOT_YET in done.stdout
    assert "Every case" not in done.stdout
    assert ElementTree.parse(tmp_path / "op.svg").getroot().tag.endswith("svg")


def synthetic(device="cpu", control=1.0, slow=0.5):
    """A result in which torch.compile beats us."""
    runs = []
    for threads in (1, 2) if device == "cpu" else (None,):
        cases = []
        for row, shape, mean in (("forward", "64x64x3x3", True), ("network forward", "G256 (14 layers)", False)):
            found = {OURS: 10.0, SECOND: 10.0 * control, "authors": 120.0, "compile": 10.0 * slow, COPY: 8.0}
            case, ratios = summarise({name: samples(*[t / 1e6] * 5) for name, t in found.items()}, 1 << 20)
            cases.append({"row": row, "shape": shape, "bytes": 1 << 20, "mean": mean, "attempts": 1, **case})
            if device == "cuda":
                cases[-1]["kernel_us"] = {name: t / 2 for name, t in found.items()}
        means = {"forward": {name: ratio.to_json() for name, ratio in ratios.items()}}
        left_out = {"seconds": 0, "left_out": None}
        run = {"threads": threads, "complete": True, "compile": left_out, "means": means, "cases": cases}
        runs.append({**run, "accepted": control == 1.0})
    machine = {"cpu": "a processor", "cpus": 2, "cpu_level": "x86-64-v3", "commit": "abc1234", "dirty": True}
    gpu = {"gpu": "a GPU", "driver": "1.2"} if device == "cuda" else {}
    return {
        "name": "op", "device": device, "command": "adafm bench op", "versions": {"torch": "2.99"}, "rows": op.ROWS,
        "method": {"rounds": 5, "control": [0.95, 1.05]}, "runs": runs, **machine, **gpu,
    }  # fmt: skip


def test_table_shows_where_we_lose():
    result = synthetic()
    head = op_table.headline(result)
    forward = next(line for line in head.splitlines() if line.startswith(f"| {op.ROWS['forward']}"))
    assert forward.split(" | ")[1:] == [
        "12.0 / 12.0",
        "",
        "**0.50** (we lose) / **0.50** (we lose)",
        "",
        "80 % / 80 % |",
    ]
    assert "G256 (14 layers): " in head and "with 1 / 2 threads" in head
    details = op_table.details(result)
    assert details.count("compile 0.50x (0.50 to 0.50) (faster than ours)") == 4
    assert "Every case, 1 thread;" in details and "Every case, 2 threads;" in details


def test_table_states_the_conditions():
    text = op_table.conditions(synthetic())
    for part in ("a processor, 2 CPUs, x86-64-v3", "torch 2.99", "commit abc1234 with uncommitted changes"):
        assert part in text
    assert "stayed within 0.95 to 1.05" in text
    rejected = op_table.conditions(synthetic(control=1.2))
    assert "**Rejected**: ours against ours left 0.95 to 1.05 in 4 cases" in rejected
    assert "**rejected**, control 1.200" in op_table.details(synthetic(control=1.2))
    stopped = synthetic()
    stopped["runs"][0].update(complete=False, compile={"seconds": 9, "left_out": "limited to 9 s of compiling"})
    assert "limited to 9 s of compiling" in op_table.conditions(stopped)
    assert "Stopped at its time limit" in op_table.conditions(stopped)


def render(path, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / "render.py"), str(path), *flags]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout


def test_render_adds_the_gpu(tmp_path):
    (tmp_path / "op_cpu.json").write_text(json.dumps(synthetic()))
    assert op_table.NOT_YET in render(tmp_path / "op_cpu.json")
    (tmp_path / "gpu_op.json").write_text(json.dumps(synthetic("cuda")))
    both = render(tmp_path / "op_cpu.json", "--details")
    assert op_table.NOT_YET not in both and "a GPU, driver 1.2" in both
    assert "| case | filter | kernel us |" in both
    assert "| 5.00 | 10.0 (10.0 to 10.0) | 10.0 | 210 | 0.80 |" in both


def test_chart():
    drawing = ElementTree.fromstring(op_chart.chart(synthetic()))
    texts = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert "1 thread" in texts and "2 threads" in texts
    # Ours at 80 % of a copy, torch.compile at 160 %, the authors' expression at 7 %: two rows, two panels.
    assert [texts.count(share) for share in ("80", "160", "7")] == [4, 4, 4]
    assert any("commit abc1234" in text for text in texts)
