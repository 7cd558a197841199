"""Settings, gauges and the command line around the training loop."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.cli.interpolate import slerp
from adafm_trainer.cli.sample import parse_seeds
from adafm_trainer.cli.train import parse_config, parse_rerun
from adafm_trainer.errors import DataError, DivergedError, SourceError, UsageError
from adafm_trainer.locate import image_path, source_path
from adafm_trainer.methods.adafm import AdaFM
from adafm_trainer.methods.config import TrainConfig
from adafm_trainer.methods.config_file import read_config, write_config
from adafm_trainer.methods.presets import METHODS, preset
from adafm_trainer.models.gpgan import build_generator
from adafm_trainer.models.source import load_pair
from adafm_trainer.models.wgan_config import WganResNetConfig
from adafm_trainer.trainer.collapse import CollapseWatch
from adafm_trainer.trainer.load import load_run
from adafm_trainer.trainer.machine import commit, dirty
from adafm_trainer.trainer.progress import duration
from adafm_trainer.trainer.start import start_run
from tiny import MODEL, digest, image_folder, settings, source_folder

from adafm_kernels import __version__, which_backend
from adafm_kernels.backends import OPS


@pytest.fixture
def world(tmp_path):
    image_folder(tmp_path / "images")
    source_folder(tmp_path / "source")
    return tmp_path


def test_config_round_trip(tmp_path):
    config = TrainConfig(data="a b", outdir="ü", lr_g=1e-4, eval_data=None, aug="flip")
    write_config(tmp_path / "config.yaml", "adafm", config, MODEL.to_json())
    method, back, model = read_config(tmp_path / "config.yaml")
    assert (method, back, model) == ("adafm", config, MODEL.to_json())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr_gg: 1.0", r"config\.yaml:\d+: unknown key 'lr_gg'; did you mean 'lr_g'"),
        ("steps 5", "expected `key: value`"),
        ("steps: 5", "appears twice"),
        ("# fine\nmethod: x", "appears twice"),
    ],
)
def test_config_mistakes_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "config.yaml"
    write_config(path, "adafm", TrainConfig(data="a", outdir="b"), {})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match=message):
        read_config(path)


def test_config_value_that_is_not_json(tmp_path):
    path = tmp_path / "config.yaml"
    write_config(path, "adafm", TrainConfig(data="a", outdir="b"), {})
    path.write_text(path.read_text().replace("steps: 500", "steps: five"))
    with pytest.raises(UsageError, match="'five'"):
        read_config(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"r1_gamma": -1.0}, r"--r1-gamma is -1\.0"),
        ({"lr_g": 2.0}, r"--lr-g is 2\.0"),
        ({"beta2": 1.0}, r"--beta2 is 1\.0"),
        ({"data_scale": 0.0}, r"--data-scale is 0\.0"),
    ],
)
def test_bad_settings_name_flag_and_value(change, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(data="a", outdir="b", **change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("faithful", [False, True])
def test_every_preset_runs_two_steps(world, method, faithful):
    if faithful and method in ("freezed", "minegan", "bsa"):
        with pytest.raises(UsageError, match=f"there is no publication of {method} on gpgan"):
            preset(method, faithful)
        return
    values = preset(method, faithful)
    values.pop("steps", None)
    # The tiny source has two stages of blocks; the published depths need seven groups.
    values["freeze_g"], values["freeze_d"] = min(values.get("freeze_g", 0), 2), min(values.get("freeze_d", 0), 1)
    run = start_run(
        method, settings(world, steps=2, **{k: v for k, v in values.items() if k not in ("tick", "snap", "batch")})
    )
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    last = [row for row in rows if "event" not in row][-1]
    assert last["step"] == 2 and math.isfinite(last["d_loss"]) and last["images"] == 8
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "blocks.json", "environment.json", "reals.png", "log.txt"}
    assert (run / "adapter" / "adapter.safetensors").is_file() and (run / "report.html").is_file()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["adafm_kernels"] == __version__ and environment["git"] == {"commit": commit(), "dirty": dirty()}
    assert environment["backends"] == dict.fromkeys(OPS, which_backend().name)


def test_faithful_flag_and_overrides():
    config = parse_config("adafm", "x", ["--data", "d", "--outdir", "o", "--faithful", "--lr-g", "3e-4"])
    assert (config.adafm_start, config.r1_gamma, config.r1_interval, config.head) == (10001, 20.0, 1, "new")
    assert config.lr_g == 3e-4 and config.faithful
    assert parse_config("adafm", "x", ["--data", "d", "--outdir", "o"]).head == "source"


def test_config_file_runs_again(world):
    first = start_run("adafm", settings(world, "first", freeze_g=2))
    assert cli.main(["train", "--config", str(first / "config.yaml"), "--outdir", str(world / "again")]) == 0
    assert digest(world / "again") == digest(first)
    arguments = ["train", "adafm", f"--config={first / 'config.yaml'}", "--outdir", str(world / "other"), "--seed", "1"]
    assert cli.main(arguments) == 0
    assert digest(world / "other") != digest(first)
    with pytest.raises(UsageError, match="is of method 'adafm'"):
        parse_rerun(["scratch", "--config", str(first / "config.yaml")])
    with pytest.raises(UsageError, match="no such file"):
        parse_rerun(["--config", str(world / "none.yaml")])


def test_new_heads_start_at_the_source_s_scale(world, monkeypatch):
    monkeypatch.setattr("adafm_trainer.methods.adafm.DISTIL_STEPS", 40)
    lines = []
    source = load_pair(world / "source")
    teacher = build_generator(MODEL)
    teacher.load_state_dict(source.average_state)
    z = torch.randn(64, MODEL.z_dim)
    scale = teacher.activations_at_join(z, None, 2).std()
    errors = {}
    for head in ("new", "distilled"):
        config, method = settings(world, head, freeze_g=2, head=head), AdaFM()
        networks = method.structure(method.target_model([source], config), config)
        method.initialise(networks, [source], config, lines.append)
        with torch.no_grad():
            made, wanted = networks.generator.head(z), teacher.activations_at_join(z, None, 2)
        assert 0.5 * scale < made.std() < 2 * scale
        errors[head] = (made - wanted).square().mean().item()
    assert errors["distilled"] < 0.7 * errors["new"]
    assert any("head fitted: relative error" in line for line in lines)


def test_scratch_writes_a_source_that_loads(world):
    run = start_run("scratch", settings(world, steps=2, source=str(world / "source")))
    pair = load_pair(run / "source")
    assert pair.cfg == MODEL and pair.discriminator_state is not None and pair.average_state is not None
    assert pair.meta["steps"] == 2


def test_frozen_weights_do_not_move_and_modulation_does(world):
    run = start_run("adafm", settings(world, freeze_g=2, freeze_d=1))
    generator, source = load_run(run).generator, load_pair(world / "source").average_state
    state = generator.state_dict()
    frozen = [n for n in source if n.startswith(("conv_img.", "resnet.4."))]
    assert frozen and all(torch.equal(state[n], source[n]) for n in frozen)
    gammas = [v for n, v in state.items() if n.endswith(".gamma")]
    assert gammas and all((g != 1).any() for g in gammas)
    assert not torch.equal(state["fc.weight"], source["fc.weight"])


def test_held_modulation_stays_identity(world):
    run = start_run("adafm", settings(world, freeze_g=2, adafm_start=10**9))
    state = load_run(run).generator.state_dict()
    assert all((v == 1).all() for n, v in state.items() if n.endswith(".gamma"))
    assert all((v == 0).all() for n, v in state.items() if n.endswith(".beta"))


def test_blank_samples_stop_the_run(world, monkeypatch):
    monkeypatch.setattr("adafm_trainer.trainer.loop.generate", lambda *a, **k: torch.ones(64, 3, 16, 16))
    with pytest.raises(DivergedError, match="blank"):
        start_run("transfergan", settings(world, steps=200, tick=200, snap=500, batch=2))


def test_non_finite_steps_stop_the_run_and_name_the_tensors(world):
    from safetensors.torch import load_file, save_file

    path = world / "source" / "discriminator.safetensors"
    state = load_file(path)
    state["fc.bias"].fill_(float("nan"))
    save_file(state, path)
    with pytest.raises(DivergedError, match=r"not finite in 3 steps in a row"):
        start_run("transfergan", settings(world, max_skips=3))


def test_collapse_gauges_see_collapse():
    torch.manual_seed(0)
    training = torch.rand(50, 3, 32, 32) * 2 - 1
    training = torch.nn.functional.interpolate(training[..., ::8, ::8], 32)
    watch = CollapseWatch(training)
    good, bad = watch.gauges(training[:40]), watch.gauges(training[:1].expand(40, -1, -1, -1))
    assert good.diversity == pytest.approx(1, abs=0.1) and good.nearest_share < 0.1 and not good.warnings(500)
    assert bad.diversity < 0.01 and bad.nearest_share == 1.0 and len(bad.warnings(500)) == 2


def test_too_many_frozen_groups_and_missing_source(world):
    with pytest.raises(SourceError, match="--freeze-g 9"):
        start_run("transfergan", settings(world, freeze_g=9))
    with pytest.raises(SourceError, match="AdaFM modulates the blocks"):
        start_run("adafm", settings(world, "b", freeze_g=1))
    with pytest.raises(SourceError, match="no source at"):
        source_path("nowhere")
    with pytest.raises(DataError, match="no images at"):
        image_path("nowhere")
    with pytest.raises(UsageError, match="starts from a source"):
        start_run("adafm", settings(world, "c", source=None))


def test_a_subset_is_drawn_by_seed_from_what_is_not_withheld(world):
    names = {}
    for number, changes in enumerate(({"subset": 3}, {"subset": 5}, {"subset": 5, "seed": 1}, {})):
        settled = settings(world, f"run{number}", steps=1, holdout=4, eval_every=-1, **changes)
        run = start_run("transfergan", settled)
        manifest = json.loads((run / "data_manifest.json").read_text())
        names[number] = {image["name"] for image in manifest["training"]["images"]}
        withheld = {image["name"] for image in manifest["evaluation"]["images"]}
        assert len(names[number]) == changes.get("subset", len(names[number])) and not names[number] & withheld
    assert names[0] < names[1] < names[3] and names[1] != names[2]
    with pytest.raises(DataError, match=r"--subset 99: .* has \d+ images to train on; ask for fewer"):
        start_run("transfergan", settings(world, "b", subset=99))


RECIPES = sorted((Path(__file__).parents[1] / "docs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipes_of_the_target_size_sweep(world, path):
    """Published settings of their method and family over which flags go."""
    source = source_folder(world / "wgan", WganResNetConfig(size=16, dim=2, z_dim=6))
    arguments = ["--source", str(source), "--data", "d", "--outdir", "o", "--batch", "8"]
    method, config, model = parse_rerun(["--config", str(path), *arguments])
    expected = {**preset(method, True, "wgan-resnet"), "batch": 8, "subset": config.subset}
    assert {name: getattr(config, name) for name in expected} == expected and model is None
    assert config.subset == int(path.stem.partition("-")[2].replace("k", "000").replace("m", "000000"))
    assert config.data == "d" and method == path.stem.partition("-")[0]


def test_a_recipe_trains(world, capsys):
    (world / "recipe.yaml").write_text('# three of them\nmethod: "transfergan"\nsubset: 3\nsteps: 1\nbatch: 2\n')
    flags = f"--source {world / 'source'} --data {world / 'images'} --device cpu --precision fp32 --eval-every -1"
    command = ["train", "--config", str(world / "recipe.yaml"), *flags.split()]
    assert cli.main([*command, "--outdir", str(world / "o")]) == 0
    assert read_config(world / "o" / "config.yaml")[1].subset == 3
    with pytest.raises(SystemExit) as stopped:
        parse_rerun(command[1:])
    assert stopped.value.code == 2 and "--outdir" in capsys.readouterr().err
    wgan = source_folder(world / "wgan", WganResNetConfig(size=16, dim=2, z_dim=6))
    (world / "recipe.yaml").write_text(f'method: "transfergan"\nsource: {json.dumps([str(wgan)])}\n')
    for more, faithful in (([], False), (["--faithful"], True)):
        named = parse_rerun(["--config", str(world / "recipe.yaml"), "--data", "d", "--outdir", "o", *more])[1]
        expected = preset("transfergan", faithful, "wgan-resnet")
        assert {name: getattr(named, name) for name in expected} == expected and named.source == (str(wgan),)
    (world / "recipe.yaml").write_text("subset: 3\n")
    with pytest.raises(UsageError, match="missing method"):
        parse_rerun(["--config", str(world / "recipe.yaml")])
    (world / "recipe.yaml").write_text('method: "gan"\n')
    with pytest.raises(UsageError, match="unknown method 'gan'"):
        parse_rerun(["--config", str(world / "recipe.yaml")])


def test_holdout_is_not_trained_on(world):
    run = start_run(
        "transfergan", settings(world, holdout=4, steps=1, eval_every=0, eval_samples=8, extractor="random-v1")
    )
    manifest = json.loads((run / "data_manifest.json").read_text())
    trained = {entry["sha256"] for entry in manifest["training"]["images"]}
    held = {entry["sha256"] for entry in manifest["evaluation"]["images"]}
    assert len(trained) == 8 and len(held) == 4 and not trained & held
    metrics = json.loads((run / "metrics.jsonl").read_text())["metrics"]
    assert "kid[random-v1]8_heldout" in metrics
    with pytest.raises(DataError, match="--holdout 11"):
        start_run("transfergan", settings(world, "b", holdout=11))


def test_commands(world, capsys):
    run = start_run("adafm", settings(world, freeze_g=2, head="new", steps=2))
    grid, strip, scores = world / "grid.png", world / "strip.png", world / "scores.json"
    assert cli.main(["sample", str(run), "--seeds", "0-3,7", "--out", str(grid)]) == 0
    assert cli.main(["interpolate", str(run), "--seeds", "0-2", "--frames", "4", "--out", str(strip)]) == 0
    image_folder(world / "other", seed=1)
    arguments = ["eval", str(run), "--data", str(world / "other"), "--samples", "8", "--extractor", "random-v1"]
    assert cli.main([*arguments, "--json", str(scores)]) == 0
    assert "kid[random-v1]8_heldout" in json.loads(scores.read_text())["metrics"]
    assert (
        cli.main(["eval", str(run), "--data", str(world / "images"), "--samples", "8", "--extractor", "random-v1"]) == 0
    )
    assert "were trained on" in capsys.readouterr().out
    assert grid.is_file() and strip.is_file()
    first = grid.read_bytes()
    assert cli.main(["sample", str(run), "--seeds", "0-3,7", "--out", str(grid)]) == 0
    assert grid.read_bytes() == first


def test_exit_codes(world, capsys):
    assert cli.main([]) == 2 and cli.main(["--help"]) == 0 and cli.main(["tarin"]) == 2
    assert cli.main(["train", "--resume", str(world / "images")]) == 2
    flags = ["--data", str(world / "none"), "--outdir", str(world / "x"), "--source", str(world / "source")]
    assert cli.main(["train", "transfergan", *flags]) == 3
    assert "no images at" in capsys.readouterr().err
    flags = ["--data", str(world / "images"), "--outdir", str(world / "y"), "--source", str(world / "images")]
    assert cli.main(["train", "transfergan", *flags]) == 4
    assert "model.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "a", "3-", "5-2", "1,,2", "-4"])
def test_bad_seeds(text):
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


def test_small_helpers():
    assert parse_seeds("0-3, 8") == [0, 1, 2, 3, 8]
    assert (duration(59.6), duration(3725)) == ("1:00", "1:02:05")
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    path = slerp(a, b, 3)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[2], b)
    torch.testing.assert_close(path[1].norm(), torch.tensor(1.5))
    torch.testing.assert_close(slerp(a, a, 3), a.expand(3, 2))
    assert dataclasses.is_dataclass(TrainConfig)
