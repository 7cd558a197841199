"""The step benchmark: the authors' step against ours, what is compared and counted, and a small run end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.bench import step, step_bars, step_table
from adafm_trainer.bench.case import CheckError
from adafm_trainer.bench.measure import OURS, SECOND
from adafm_trainer.bench.step_cases import StepCase, cases, make_start
from adafm_trainer.bench.step_check import compare, first_iteration, judge, networks_bytes, same_bits
from adafm_trainer.bench.step_child import D_STEP_R1, G_STEP, REAL_PASS
from adafm_trainer.bench.step_launches import count, named_calls
from adafm_trainer.bench.step_rounds import ITERATION
from adafm_trainer.bench.step_ways import (
    COMPILED,
    FULL,
    GRAPHED,
    LEAF,
    PUBLISHED,
    REFERENCE,
    SWITCHED,
    WAYS,
    build,
    fast_type,
)
from adafm_trainer.bench.step_workers import GIVE_BACK, Child
from adafm_trainer.errors import UsageError
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.trainer.graphs import EAGER_STEPS, GraphedStep
from test_graphs import Recorder

from adafm_kernels.nn import AdaFMConv2d

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}
ADAFM = StepCase(
    "adafm-128", "AdaFM pair", 2,
    ModelConfig(arch="adafm", base="resnet2", size=32, nf=2, z_dim=4, style_dim=4, keep=3), passes=True,
)  # fmt: skip
MODULATED = StepCase("modulated-256", "modulated pair", 2, ModelConfig("resnet4", 64, nf=2, z_dim=4), fully=True)
EAGER = [way for way in WAYS if way not in (SECOND, COMPILED, GRAPHED)]


@pytest.fixture(scope="module", params=[ADAFM, MODULATED], ids=lambda case: case.name)
def double(request):
    """A case, its start and the first iteration of the reference, in float64."""
    case = request.param
    start = make_start(case, torch.float64)
    return case, start, first_iteration(build(case, REFERENCE, "cpu", start))


@pytest.mark.parametrize("way", EAGER)
def test_every_configuration_computes_the_same_step(double, way):
    case, start, expected = double
    errors = compare(first_iteration(build(case, way, "cpu", start)), expected, start, way)
    assert set(errors) == {
        f"{n}{w}" for n in ("generator", "discriminator") for w in (" gradients", " loss", ", worst tensor")
    }
    assert max(errors.values()) < 1e-10


def test_the_authors_step_moves_parameters_and_average_as_ours(double):
    case, start, _ = double
    ours, theirs = (build(case, way, "cpu", start) for way in (REFERENCE, PUBLISHED))
    for _ in range(2):
        for run in (ours, theirs):
            run.generator()
            run.average()
            run.discriminator(True)
    pairs = [(ours.networks.generator, theirs.networks.generator), (ours._average.module, theirs.step.averaged)]
    pairs.append((ours.networks.discriminator, theirs.networks.discriminator))
    for mine, other in pairs:
        found, initial = dict(other.named_parameters()), {**start.discriminator, **start.generator}
        assert any(not torch.equal(p, initial[name]) for name, p in mine.named_parameters())
        for name, parameter in mine.named_parameters():
            torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-10)


def test_penalty_and_modulation_matter_in_what_is_compared(double):
    case, start, expected = double
    run = build(case, REFERENCE, "cpu", start)
    run.generator()
    run.discriminator(False)
    without = {name: p.grad for name, p in run.networks.discriminator.named_parameters() if p.grad is not None}
    theirs = expected.gradients["discriminator"]
    distance = sum((without[name] - theirs[name]).square().sum() for name in without)
    assert distance > 1e-4 * sum(gradient.square().sum() for gradient in theirs.values())
    assert any(name.endswith(".gamma") and g.abs().max() > 0 for name, g in expected.gradients["generator"].items())


def test_a_wrong_gradient_is_seen():
    start = make_start(ADAFM)
    expected = first_iteration(build(ADAFM, REFERENCE, "cpu", start))
    found = first_iteration(build(ADAFM, PUBLISHED, "cpu", start))
    judge(compare(found, expected, start, "x"), "float32", None, "x")
    gradients = found.gradients["discriminator"]
    gradients["fc.weight"] = gradients["fc.weight"] * 1.5
    with pytest.raises(CheckError, match=r"x: discriminator, worst tensor off by 0\.5 of ours in float32"):
        judge(compare(found, expected, start, "x"), "float32", None, "x")
    del gradients["fc.weight"]
    with pytest.raises(CheckError, match=r"the discriminator has no gradient of fc\.weight"):
        compare(found, expected, start, "x")


def test_half_precision_is_judged_by_eager_pytorch():
    judge({"loss": 0.07}, "bfloat16", {"loss": 0.04}, "x")
    with pytest.raises(CheckError, match=r"allowed are 0\.08"):
        judge({"loss": 0.09}, "bfloat16", {"loss": 0.04}, "x")
    with pytest.raises(CheckError, match=r"off by nan"):
        judge({"loss": float("nan")}, "bfloat16", None, "x")


def test_a_gradient_that_is_zero_but_for_rounding_is_no_error():
    start = make_start(ADAFM)
    expected, found = (first_iteration(build(ADAFM, REFERENCE, "cpu", start)) for _ in range(2))
    theirs, mine = (one.gradients["discriminator"] for one in (expected, found))
    weight, bias = (f"resnet_3_0.conv_0.{leaf}" for leaf in ("weight", "bias"))
    unit = torch.ones_like(theirs[bias]) * theirs[weight].norm() / theirs[bias].numel() ** 0.5
    theirs[bias], mine[bias] = 1e-9 * unit, -1e-9 * unit
    assert compare(found, expected, start, "x")["discriminator, worst tensor"] < 1e-6
    mine[bias] = 1e-3 * unit
    assert compare(found, expected, start, "x")["discriminator, worst tensor"] == pytest.approx(0.1, rel=1e-4)


def test_merging_loss_and_penalty_leaves_every_bit():
    bits = same_bits(build(ADAFM, REFERENCE, "cpu", make_start(ADAFM)))
    assert bits["equal"] == bits["of"] > 10


def test_start_values_are_the_same_every_time():
    one, two = make_start(ADAFM), make_start(ADAFM)
    assert all(torch.equal(one.generator[name], two.generator[name]) for name in one.generator)
    assert torch.equal(one.z, two.z) and torch.equal(one.real, two.real)


def test_sizes_are_those_that_the_bars_name():
    sizes = {case.name: case for case in cases("cpu", quick=False)}
    assert {name: case.batch for name, case in sizes.items()} == {
        "adafm-128": 4, "modulated-256": 2, "modulated-128": 4, "demo": 16,
    }  # fmt: skip
    assert (sizes["adafm-128"].model.nf, sizes["modulated-256"].model.nf) == (64, 32)
    assert sizes["adafm-128"].config.r1_interval == 1 and sizes["adafm-128"].config.adafm_start == 0
    assert {bar.case for bar in step_bars.BARS} < set(sizes)
    assert all(case.batch > sizes[case.name].batch for case in cases("cuda", quick=False))
    networks = MODULATED.networks()
    for network in (networks.generator, networks.discriminator):
        names = [name for name, _ in network.named_modules() if name.endswith(("conv_0", "conv_1"))]
        assert names and all(hasattr(network.get_submodule(name), "gamma") for name in names)
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        assert {name.rpartition(".")[2] for name in trained if not name.startswith("fc.")} == {"gamma", "beta"}


def test_launches_are_counted():
    start = make_start(MODULATED)
    ours, theirs = (count(build(MODULATED, way, "cpu", start), "cpu") for way in (OURS, PUBLISHED))
    layers = sum(name.endswith(".gamma") for name in start.generator)
    for network in ("generator", "discriminator"):
        assert ours["parts"][network]["modulation"] <= 1 and ours["parts"][network]["reduction"] == 1
        assert sum(ours["parts"][network].values()) <= step_bars.MOST_CALLS
        assert 0 < ours["total"][network] < theirs["total"][network]
    # Two repetitions, a product and a sum for each layer and forward.
    assert theirs["parts"]["generator"]["modulation"] == 4 * layers
    assert theirs["parts"]["generator"]["average"] >= 3 * len(start.generator)


def test_three_step_sizes_share_the_calls():
    """The demo's generator trains a head, gamma and beta, each with a step size of its own."""
    demo = StepCase("demo", "the demo's pair", 2, None)
    run = build(demo, OURS, "cpu", make_start(demo))
    assert len({group["lr"] for group in run.step.G.optimizer.param_groups}) == 3
    parts = count(run, "cpu")["parts"]
    assert parts["generator"] == {"modulation": 1, "reduction": 1, "optimizer": 1, "average": 1}
    assert sum(parts["discriminator"].values()) <= step_bars.MOST_CALLS


def test_calls_are_told_apart_by_name():
    names = [
        "adafm_compiled::modulate_many_out",
        "adafm::modulate_many_backward_out",
        "aten::_fused_adam_",
        "aten::mul",
    ]
    assert named_calls([*names, "aten::_foreach_lerp_"]) == dict.fromkeys(named_calls([]), 1)
    assert named_calls(["adafm::step_many", "adafm_compiled::adam_many"])["optimizer"] == 2


def test_memory_that_modulation_may_take():
    networks = ADAFM.networks()
    found = networks_bytes(networks, torch.bfloat16)
    layers = [m for m in networks.generator.modules() if isinstance(m, AdaFMConv2d)]
    assert len(layers) == 8
    assert found["weights"] == 2 * sum(m.weight.numel() for m in layers)
    assert found["state"] == 5 * 4 * sum(2 * m.gamma.numel() for m in layers)
    both = MODULATED.networks()
    pairs = [
        sum(m.gamma.numel() + m.beta.numel() for m in network.modules() if isinstance(m, AdaFMConv2d))
        for network in (both.generator, both.discriminator)
    ]
    # The discriminator has no average.
    assert networks_bytes(both, None)["state"] == 4 * (5 * pairs[0] + 4 * pairs[1])


def test_peak_memory_is_that_of_the_step(tmp_path):
    """Two processes agree to the noise of an interpreter where freed blocks are given back."""
    with Child("modulated-256", REFERENCE, "cpu", True, 1, tmp_path):
        pass
    peaks = []
    for _ in range(2):
        with Child("modulated-256", OURS, "cpu", True, 1, tmp_path, GIVE_BACK) as child:
            peaks.append(child.known["peak_bytes"])
    assert min(peaks) > 2**20 and max(peaks) - min(peaks) <= max(2**21, 0.02 * max(peaks))


def test_graphs_are_a_configuration_of_their_own():
    """Every kind of step is captured before it is timed, the second kind too, and computes what it does outside."""
    start, runs = make_start(MODULATED), []
    with pytest.raises(UsageError, match="--graphs on: cpu has no CUDA graphs"):
        build(MODULATED, GRAPHED, "cpu", start)
    for graphed in (False, True):
        run = build(MODULATED, OURS, "cpu", start)
        if graphed:
            recorder = Recorder(run.step)
            run.step = GraphedStep(run.step, recorder)
        losses = []
        for _ in range(EAGER_STEPS + 2):
            losses.append(
                [float(loss) for loss in (run.generator(), run.discriminator(False), run.discriminator(True))]
            )
        runs.append(losses)
    assert runs[0] == runs[1] and recorder.events.count("capture") == 3
    parts = count(run, "cpu")["parts"]
    assert all(found["reduction"] == 1 for found in parts.values()) and isinstance(run.step, GraphedStep)


def test_what_a_device_can_have():
    assert GRAPHED not in step.short_ways("cpu").values()
    assert list(step.short_ways("cuda").values()) == list(WAYS)[2:]


def row(milliseconds, ratio=None, peak=100.0, calls=1):
    times = {"median_ms": milliseconds, "p20_ms": milliseconds, "p80_ms": milliseconds, "cpu_ms": milliseconds}
    low, median, high = ratio or (1.0, 1.0, 1.0)
    found = {"median": median, "low": low, "high": high}
    parts = (ITERATION, G_STEP, D_STEP_R1, REAL_PASS)
    counted = {network: {"modulation": calls, "reduction": 1} for network in ("generator", "discriminator")}
    made = {
        "times": {part: {**times, "rounds": 15} for part in parts},
        "images_per_second": 4e3 / milliseconds,
        "peak_bytes": int(peak * 2**20),
        "modulated_bytes": {"weights": 2**20, "state": 2**20},
        "launches": {"total": {"generator": 10 * calls, "discriminator": 5}, "parts": counted},
    }
    return made if ratio is None else {**made, "ratios": dict.fromkeys(parts, found)}


def synthetic(control=1.0, published=(2.0, 2.1, 2.2), leaf=(0.96, 0.97, 1 / 1.04), peak=102.0, calls=3):
    ways = {
        OURS: row(1000.0, peak=peak, calls=calls),
        SECOND: row(1000.0, (control,) * 3),
        PUBLISHED: row(2100.0, published, calls=50),
        SWITCHED: row(900.0, (0.8, 0.9, 0.95), calls=40),
        LEAF: row(970.0, leaf),
    }
    ratio = {"median": control, "low": control, "high": control}
    found = {
        "name": "adafm-128", "title": "AdaFM pair", "batch": 4, "interval": 1, "bits": {"equal": 45, "of": 45},
        "left_out": {COMPILED: "no compiler"}, "ways": ways, "accepted": control == 1.0,
        "sets": [{"attempts": 1, "control": {ITERATION: ratio, G_STEP: ratio}, "accepted": control == 1.0}],
    }  # fmt: skip
    return {
        "name": "step", "device": "cpu", "threads": 2, "cpu": "a processor", "commit": "abc1234", "dirty": False,
        "type": "bfloat16", "versions": {"torch": "2.99"}, "method": {"rounds": 15, "control": [0.98, 1.02]},
        "command": "adafm bench step", "cases": [found], "bars": step_bars.judge_bars([found]),
    }  # fmt: skip


def held(result, text):
    return [bar["holds"] for bar in result["bars"] if text in f"{bar['case']}, {bar['text']}"]


def test_bars_hold_by_the_better_end_of_their_interval():
    result = synthetic()
    assert held(result, f"{PUBLISHED} / ours") == [True]
    assert held(result, f"adafm-128, iteration: ours / {LEAF}") == [True]
    assert held(result, f"adafm-128, iteration: {SWITCHED} / ours") == [False]
    assert held(result, "modulated-256") == [None, None]
    worse = synthetic(published=(2.0, 2.1, 2.19), leaf=(0.94, 0.95, 0.96))
    assert held(worse, f"{PUBLISHED} / ours") == [False]
    assert held(worse, f"adafm-128, iteration: ours / {LEAF}") == [False]


def test_bars_of_bits_launches_and_memory():
    result = synthetic()
    assert held(result, "bit-identical") == [True]
    assert held(result, "calls that") == [True, True] and held(synthetic(calls=4), "calls that") == [False, False]
    assert any(bar["measured"] == "4; the authors' code 51 and 41" for bar in result["bars"])
    assert held(result, "peak memory") == [True] and held(synthetic(peak=102.1), "peak memory") == [False]


def test_table_says_what_was_measured_and_where_we_lose():
    text = step_table.table(synthetic())
    assert f"| {PUBLISHED} | 2100 (2100 to 2100) | 2100 | 1.90 | 2.100 (2.000 to 2.200) | 100 | 505 |" in text
    assert "0.900 (0.800 to 0.950) (faster than ours)" in text and "| left out: no compiler |" in text
    assert "**missed**" in text and "not judged" in text
    for part in ("a processor, 2 threads", "torch 2.99", "commit abc1234;", "stayed within 0.98 to 1.02"):
        assert part in text
    rejected = step_table.table(synthetic(control=1.03))
    assert "**Rejected**: ours against ours left 0.98 to 1.02: adafm-128, iteration 1.030" in rejected


def test_nothing_is_reported_where_a_result_is_wrong(monkeypatch, tmp_path, capsys):
    def wrong(*arguments):
        raise CheckError("adafm-128, x: generator loss off by 2")

    monkeypatch.setattr(step, "measure_case", wrong)
    assert cli.main(["bench", "step", "--quick", "--json", str(tmp_path / "step.json")]) == 1
    assert "nothing is reported: adafm-128, x" in capsys.readouterr().err
    assert not (tmp_path / "step.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "adafm-64"], "--cases adafm-64: expected some of adafm-128,modulated-256"),
        (["--ways", "leaf,fastest"], "--ways fastest: expected some of published,"),
        (["--ways", "graphs"], "--ways graphs: expected some of published,switched,compile,leaf,full"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_bad_flags_name_the_value(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        step.main(["--quick", *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_bench_names_what_it_measures(capsys):
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "op " in shown and "step " in shown
    assert cli.main(["bench", "steps"]) == 2


@pytest.mark.slow
def test_quick_run(tmp_path):
    path, drawing = tmp_path / "step.json", tmp_path / "step.svg"
    flags = ["--quick", "--rounds", "2", "--cases", "adafm-128", "--ways", "switched,leaf", "--json", str(path)]
    code = f"import sys; sys.modules['tyro'] = None\nfrom adafm_trainer.bench import step\nsys.exit(step.main({flags}))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {"cpu", "commit", "dirty", "versions", "method", "threads", "bars", "command"} <= set(result)
    (case,) = result["cases"]
    assert set(case["ways"]) == {OURS, SECOND, SWITCHED, LEAF} and case["bits"]["equal"] == case["bits"]["of"]
    for way, found in case["ways"].items():
        assert all(t["p20_ms"] <= t["median_ms"] <= t["p80_ms"] and t["cpu_ms"] > 0 for t in found["times"].values())
        assert found["times"][ITERATION]["rounds"] == 2 and found["images_per_second"] > 0
        assert found["launches"]["total"]["generator"] > 0
        assert found["peak_bytes"] is None if way == SECOND else found["peak_bytes"] > 2**20
        assert found["errors"]["generator gradients"] < 0.3
        assert (way == OURS) == ("ratios" not in found)
    assert (REAL_PASS in case["ways"][SWITCHED]["times"]) and (REAL_PASS not in case["ways"][LEAF]["times"])
    assert done.stdout.strip() == step_table.table(result)
    command = [sys.executable, "benchmarks/render.py", str(path), "--chart", str(drawing)]
    shown = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert shown.startswith(step_table.table(result)) and "not measured on a GPU yet" in shown
    texts = [element.text for element in ElementTree.parse(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert {OURS, SWITCHED, LEAF} <= set(texts) and any("commit" in text for text in texts)


def test_full_fine_tuning_trains_everything_and_modulates_nothing():
    networks = build(MODULATED, FULL, "cpu", make_start(MODULATED)).networks
    for network in (networks.generator, networks.discriminator):
        assert all(parameter.requires_grad for parameter in network.parameters())
        assert not any(isinstance(layer, AdaFMConv2d) for layer in network.modules())


def test_plain_leaves_are_trained_in_the_type_and_layout_of_the_convolutions():
    run = build(ADAFM, LEAF, "cpu", make_start(ADAFM))
    weight = run.networks.generator.resnet_5_0.conv_0.weight
    assert weight.requires_grad and weight.dtype == (fast_type("cpu") or torch.float32)
    assert any(weight is p for group in run.step.G.optimizer.param_groups for p in group["params"])
    assert not run.networks.generator.resnet_5_0.conv_0.bias.requires_grad
