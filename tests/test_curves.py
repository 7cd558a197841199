"""The training curves: two ways over several seeds, compared, shown, and picked up where they were left."""

from __future__ import annotations

import json

import pytest
from adafm_trainer.bench import curves
from adafm_trainer.bench.curves import FAST, PLAIN, compare, main, table


def runs(fast: list[float], plain: list[float]) -> list[dict]:
    listed = []
    for way, values in ((FAST, fast), (PLAIN, plain)):
        for seed, value in enumerate(values):
            ends = {"value": [1.0, value], "low": [0.9, value - 0.02], "high": [1.1, value + 0.02]}
            listed.append({"way": way, "seed": seed, "metric": "kid[x]1k_heldout", "at": [5, 10], **ends})
    return listed


def test_the_interval_is_students_over_paired_differences() -> None:
    found = compare(runs([0.5, 0.6, 0.7], [0.5, 0.5, 0.5]))
    # Differences 0, 0.1, 0.2: mean 0.1, deviation 0.1, t(2) = 4.303.
    half = 4.303 * 0.1 / 3**0.5
    assert found["difference"]["mean"] == pytest.approx(0.1)
    assert found["difference"]["low"] == pytest.approx(0.1 - half)
    assert found["means"] == {FAST: pytest.approx(0.6), PLAIN: pytest.approx(0.5)}
    assert found["same"]


def test_a_steady_difference_is_no_agreement() -> None:
    found = compare(runs([0.60, 0.61, 0.60], [0.50, 0.50, 0.51]))
    assert not found["same"]
    shown = {"versions": {}, "cpu": "c", "commit": "d", "runs": runs([0.60, 0.61, 0.60], [0.50, 0.50, 0.51]), **found}
    assert "**which excludes 0**" in table(shown)


def test_seeds_must_be_the_same_both_ways() -> None:
    with pytest.raises(ValueError, match="both ways need the same"):
        compare(runs([0.5, 0.6], [0.5, 0.6, 0.7]))


@pytest.mark.parametrize("seeds", ["0", "0,0", "a,b"])
def test_bad_seeds_are_refused(seeds: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--seeds", seeds])
    assert stop.value.code == 2
    assert seeds in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_made_once_and_compared(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--outdir", str(tmp_path / "runs"), "--steps", "1", "--every", "1", "--seeds", "3,4", "--samples", "8"]
    assert main([*arguments, "--json", str(tmp_path / "curves.json")]) == 0
    result = json.loads((tmp_path / "curves.json").read_text())
    assert [(run["way"], run["seed"]) for run in result["runs"]] == [(FAST, 3), (PLAIN, 3), (FAST, 4), (PLAIN, 4)]
    assert all(run["at"] == [1] for run in result["runs"])

    def refuse(*_: object) -> None:
        raise AssertionError("a complete run was run again")

    monkeypatch.setattr(curves, "start_run", refuse)
    monkeypatch.setattr(curves, "resume_run", refuse)
    assert main(arguments) == 0
    assert main([*arguments, "--samples", "9"]) == 2
