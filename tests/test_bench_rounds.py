"""How the processes of a step benchmark take turns: pairing, the control, memory, and what is left out."""

from __future__ import annotations

import pytest
from adafm_trainer.bench import step_rounds
from adafm_trainer.bench.case import CheckError
from adafm_trainer.bench.measure import OURS, SECOND, Samples
from adafm_trainer.bench.step import short_ways
from adafm_trainer.bench.step_cases import cases
from adafm_trainer.bench.step_child import D_STEP, D_STEP_R1, G_STEP, REAL_PASS
from adafm_trainer.bench.step_rounds import (
    ATTEMPTS,
    FEW_ROUNDS,
    ITERATION,
    WARM_UP,
    iteration,
    measure_case,
    measure_set,
    summarise_set,
    take_rounds,
)
from adafm_trainer.bench.step_ways import COMPILED, FULL, LEAF, PUBLISHED, SWITCHED
from adafm_trainer.bench.step_workers import together

GIB = 2**30


class FakeWorker:
    """Says how long every part takes, and notes who was asked for what."""

    def __init__(self, way, seconds, asked):
        self.way, self.seconds, self.asked = way, seconds, asked

    def ask(self, **command):
        self.asked.append((self.way, command.get("parts", command["do"])))
        if command["do"] == "count":
            return {"total": {"generator": 1, "discriminator": 1}, "parts": {}}
        seconds = self.seconds(len(self.asked)) if callable(self.seconds) else self.seconds
        return {part: [seconds, 2 * seconds] for part in command["parts"]}


def workers(**seconds):
    asked = []
    return {way: FakeWorker(way, time, asked) for way, time in seconds.items()}, asked


def test_rounds_are_shuffled_and_the_first_are_dropped():
    found, asked = workers(**{OURS: 1.0, SECOND: 1.0, LEAF: 2.0})
    samples = take_rounds(found, list(found), [G_STEP, D_STEP_R1], 20)
    assert all(len(samples[way][part].wall) == 20 for way in found for part in (G_STEP, D_STEP_R1))
    orders = [tuple(way for way, _ in asked[3 * k : 3 * k + 3]) for k in range(20 + WARM_UP)]
    assert all(sorted(order) == sorted(found) for order in orders) and len(set(orders)) > 3
    assert samples[LEAF][G_STEP].wall[0] == 2.0 and samples[LEAF][G_STEP].cpu[0] == 4.0


def test_an_iteration_takes_the_penalty_in_its_share_of_steps():
    parts = {G_STEP: Samples(1, [1.0], [2.0]), D_STEP: Samples(1, [2.0], [2.0]), D_STEP_R1: Samples(1, [6.0], [6.0])}
    assert iteration(parts, 4).wall == [1.0 + 0.25 * 6.0 + 0.75 * 2.0]
    assert iteration(parts, 1).wall == [7.0] and iteration(parts, 1).cpu == [8.0]


@pytest.mark.parametrize(("ratio", "accepted"), [(0.979, False), (0.98, True), (1.02, True), (1.021, False)])
def test_control(ratio, accepted):
    time = lambda seconds: {part: Samples(1, [seconds] * 5, [seconds] * 5) for part in (G_STEP, D_STEP_R1)}  # noqa: E731
    head, rows = summarise_set({OURS: time(1.0), SECOND: time(ratio), LEAF: time(3.0)}, 1)
    assert head["accepted"] is accepted and head["control"][ITERATION]["median"] == pytest.approx(ratio)
    assert rows[LEAF]["ratios"][ITERATION]["median"] == 3.0 and "ratios" not in rows[OURS]
    assert rows[LEAF]["times"][ITERATION]["median_ms"] == 6000.0


def test_a_failed_control_is_measured_again(capsys):
    found, _ = workers(**{OURS: 1.0, SECOND: 1.5})
    samples, attempts = measure_set(found, 1, False, 3)
    assert attempts == ATTEMPTS and not summarise_set(samples, 1)[0]["accepted"]
    assert capsys.readouterr().err.count("the control left") == ATTEMPTS
    # The second process is slow during the first attempt only.
    first = 2 * (WARM_UP + 3)
    found, _ = workers(**{OURS: 1.0, SECOND: lambda number: 1.5 if number <= first else 1.0})
    samples, attempts = measure_set(found, 1, False, 3)
    assert attempts == 2 and summarise_set(samples, 1)[0]["accepted"]


def test_parts_beside_the_iteration():
    found, _ = workers(**{OURS: 1.0, SECOND: 1.0, SWITCHED: 1.3, PUBLISHED: 2.0})
    samples, _ = measure_set(found, 1, True, 15)
    assert {way: len(parts.get(REAL_PASS, Samples(1)).wall) for way, parts in samples.items()} == {
        OURS: 15, SECOND: 15, SWITCHED: 15, PUBLISHED: 0,
    }  # fmt: skip
    assert all(len(parts[D_STEP].wall) == FEW_ROUNDS for parts in samples.values())
    head, rows = summarise_set(samples, 1)
    assert rows[SWITCHED]["ratios"][REAL_PASS]["median"] == 1.3 and REAL_PASS in head["control"]
    samples, _ = measure_set(found, 16, False, 15)
    assert all(len(parts[D_STEP].wall) == 15 and REAL_PASS not in parts for parts in samples.values())


def test_as_many_processes_as_fit_into_memory():
    known = {"room_bytes": 20 * GIB, "peak_bytes": 3 * GIB, "resident_bytes": 2 * GIB}
    assert together(known, None) == 4
    assert together(known, 100 * GIB) == 22
    assert together({**known, "room_bytes": None}, None) > 1000


def fake_children(monkeypatch, wrong=None, failing=None):
    """Put processes in place that only pretend; returns the timed ones that started, in order, those of them that
    ended, and those started for their peak memory."""
    started, ended, measured = [], [], []

    class Child(FakeWorker):
        def __init__(self, case, way, device, quick, threads, folder, environment=None):
            super().__init__(way, 1.0, [])
            self.log = ended if environment is None else []
            (started if environment is None else measured).append(way)
            if way == failing:
                raise CheckError(f"{way}: the process ended with code 1")
            self.known = {
                "errors": {"loss": 0.9 if way == wrong else 0.01}, "type": "bfloat16",
                "peak_bytes": (3 if environment else 2) * GIB,
                "resident_bytes": GIB, "room_bytes": 100 * GIB, "modulated_bytes": None, "bits": {"equal": 1, "of": 1},
            }  # fmt: skip

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.log.append(self.way)

    monkeypatch.setattr(step_rounds, "Child", Child)
    monkeypatch.setattr(step_rounds, "cannot_compile", lambda device: None)
    return started, ended, measured


CASE = cases("cpu", quick=True)[0]
WAYS = [OURS, SECOND, *short_ways("cpu").values()]


def test_a_case_in_sets_that_fit(monkeypatch):
    started, ended, measured = fake_children(monkeypatch)
    found = measure_case(CASE, WAYS, "cpu", True, 2, 2, 12 * GIB)
    # Four together: ours, its control and two more.
    assert [each["configurations"][2:] for each in found["sets"]] == [
        [SWITCHED, PUBLISHED],
        [COMPILED, LEAF],
        [FULL],
    ]
    assert sorted(started) == sorted(ended) and started.count(OURS) == 3
    assert list(found["ways"]) == WAYS and found["accepted"] and not found["left_out"]
    assert found["ways"][LEAF]["images_per_second"] == CASE.batch / 2.0
    # The peak is that of a process that is not timed; the control needs none.
    assert sorted(measured) == sorted(way for way in WAYS if way != SECOND)
    peaks = {way: row["peak_bytes"] for way, row in found["ways"].items()}
    assert peaks == {**dict.fromkeys(WAYS, 3 * GIB), SECOND: None}


def test_on_a_gpu_a_process_knows_its_own_peak(monkeypatch):
    _, _, measured = fake_children(monkeypatch)
    found = measure_case(CASE, [OURS, SECOND, LEAF], "cuda", True, 2, 2, None)
    assert not measured and all(row["peak_bytes"] == 2 * GIB for row in found["ways"].values())


@pytest.mark.parametrize("kind", ["wrong", "failing"])
def test_a_wrong_configuration_ends_the_case_but_torch_compile_is_left_out(monkeypatch, kind):
    started, ended, _ = fake_children(monkeypatch, **{kind: LEAF})
    with pytest.raises(CheckError, match=LEAF):
        measure_case(CASE, WAYS, "cpu", True, 2, 2, None)
    assert set(ended) >= set(started) - {LEAF}
    fake_children(monkeypatch, **{kind: COMPILED})
    found = measure_case(CASE, WAYS, "cpu", True, 2, 2, None)
    assert COMPILED not in found["ways"] and COMPILED in found["left_out"][COMPILED]
    assert len(found["sets"]) == 1


def test_torch_compile_without_a_compiler_is_left_out(monkeypatch):
    started, _, measured = fake_children(monkeypatch)
    monkeypatch.setattr(step_rounds, "cannot_compile", lambda device: "no compiler")
    found = measure_case(CASE, [OURS, SECOND, COMPILED], "cpu", True, 2, 2, None)
    assert found["left_out"] == {COMPILED: "no compiler"} and COMPILED not in [*started, *measured]
