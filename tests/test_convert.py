"""Published checkpoints: reading without executing, sizes from shapes, and the convert command."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from adafm_trainer.cli.convert import ConvertArgs, main, run
from adafm_trainer.errors import SourceError
from adafm_trainer.models.checkpoints import infer_config, load_matching, read_checkpoint
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.names import state_to_reference
from adafm_trainer.models.source import load_pair
from safetensors.torch import save_file

CONFIGS = [
    ModelConfig("resnet", 64, nf=2, nf_max=8, z_dim=10, embed=1),
    ModelConfig("resnet", 128, nf=2, z_dim=7),
    ModelConfig("resnet2", 64, nf=2, z_dim=16, embed=8, nlabels=5),
    ModelConfig("resnet3", 64, nf=1, z_dim=10, embed=1, channels=1),
    ModelConfig("resnet4", 128, nf=1, z_dim=12, embed=1),
    ModelConfig("resnet2", 32, nf=2, z_dim=9, nlabels=3),
    ModelConfig("adafm", 64, nf=2, z_dim=6, embed=1, base="resnet2", keep=4, style_dim=5, s0=2),
    ModelConfig("adafm", 32, nf=2, nf_max=4, z_dim=6, base="resnet", keep=3, style_dim=5, s0=4),
    ModelConfig("adafm", 64, nf=1, z_dim=6, base="resnet3", keep=3, style_dim=5, s0=2),
    ModelConfig("adafm", 64, nf=2, z_dim=6, base="resnet2", keep=7, style_dim=5, s0=1),
]


class Marker:
    """Unpickling this makes a file: what a checkpoint that carries code does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def published(cfg: ModelConfig, seed: int = 0) -> dict:
    """The dictionary that the published training code saves, after data parallelism and an optimizer step."""
    torch.manual_seed(seed)
    generator, discriminator = build_generator(cfg), build_discriminator(cfg)
    average = build_generator(cfg)
    optimizer = torch.optim.Adam(discriminator.parameters(), betas=(0.0, 0.99))
    discriminator(torch.randn(1, cfg.channels, cfg.size, cfg.size)).sum().backward()
    optimizer.step()
    states = {"generator": generator, "discriminator": discriminator, "generator_test": average}
    entries = {
        name: OrderedDict((f"module.{key}", value) for key, value in state_to_reference(module.state_dict()).items())
        for name, module in states.items()
    }
    return {**entries, "d_optimizer": optimizer.state_dict(), "it": 600000, "fid_best": np.float64(12.5)}


def arguments(file: Path, out: Path, cfg: ModelConfig, **changes) -> ConvertArgs:
    return ConvertArgs(file=file, out=out, arch=cfg.arch, base=cfg.base or "resnet2", **changes)


def named(cfg: ModelConfig) -> str:
    return f"{cfg.arch}-{cfg.base}-{cfg.keep}-{cfg.size}" if cfg.base else f"{cfg.arch}-{cfg.size}"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("cfg", CONFIGS, ids=named)
def test_a_published_checkpoint_becomes_a_source(tmp_path, capsys, cfg: ModelConfig, legacy: bool) -> None:
    entries = published(cfg)
    torch.save(entries, tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
    assert run(arguments(tmp_path / "net.pt", tmp_path / "out", cfg)) == 0
    pair = load_pair(tmp_path / "out")
    assert pair.cfg == cfg
    states = (pair.generator_state, pair.discriminator_state, pair.average_state)
    for name, state in zip(("generator", "discriminator", "generator_test"), states, strict=True):
        expected = entries[name]
        assert {f"module.{key}" for key in state_to_reference(state)} == set(expected)
        for key, value in state_to_reference(state).items():
            assert torch.equal(value, expected[f"module.{key}"])
    build_generator(pair.cfg).load_state_dict(pair.generator_state)
    build_discriminator(pair.cfg).load_state_dict(pair.discriminator_state)
    printed = capsys.readouterr().out
    assert "ignored: d_optimizer (optimizer state)" in printed
    assert "ignored: it (600000)" in printed
    assert "ignored: fid_best (12.5)" in printed
    assert "0 missing, 0 unexpected, 0 mismatched" in printed
    assert pair.meta["converted_from"] == "net.pt"
    assert pair.meta["not_loaded"] == {}


@pytest.mark.parametrize(
    "present",
    [("generator",), ("generator_test",), ("generator", "discriminator"), ("generator_test", "discriminator")],
    ids="+".join,
)
def test_networks_may_be_absent(tmp_path, capsys, present: tuple[str, ...]) -> None:
    cfg, entries = CONFIGS[2], published(CONFIGS[2])
    torch.save({name: entries[name] for name in present}, tmp_path / "net.pt")
    assert run(arguments(tmp_path / "net.pt", tmp_path / "out", cfg)) == 0
    pair = load_pair(tmp_path / "out")
    assert (pair.discriminator_state is not None) == ("discriminator" in present)
    assert (pair.average_state is not None) == ("generator_test" in present)
    first = entries["generator" if "generator" in present else "generator_test"]
    assert torch.equal(pair.generator_state["fc.weight"], first["module.fc.weight"])
    printed = capsys.readouterr().out
    assert ("its average, generator_test, is taken for it" in printed) == ("generator" not in present)
    assert ("discriminator: not in the file" in printed) == ("discriminator" not in present)


def test_safetensors_and_bare_state_dictionaries_are_read(tmp_path) -> None:
    cfg, entries = CONFIGS[0], published(CONFIGS[0])
    flat = {f"{name}.{key}": value for name in ("generator", "discriminator") for key, value in entries[name].items()}
    save_file(flat, tmp_path / "net.safetensors")
    assert run(arguments(tmp_path / "net.safetensors", tmp_path / "a", cfg)) == 0
    assert load_pair(tmp_path / "a").discriminator_state is not None
    bare = build_generator(cfg)
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    save_file(bare.state_dict(), tmp_path / "bare.safetensors")
    for name in ("bare.pt", "bare.safetensors"):
        assert read_checkpoint(tmp_path / name).networks.keys() == {"generator"}
        assert run(arguments(tmp_path / name, tmp_path / "b", cfg)) == 0


def test_code_in_a_pickle_is_named_and_not_executed(tmp_path) -> None:
    for legacy in (False, True):
        marker, path = tmp_path / "marker", tmp_path / "evil.pt"
        entries = {**published(CONFIGS[0]), "extra": Marker(marker)}
        torch.save(entries, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(SourceError, match=r"asks for (posix|nt)\.mkdir, which is code .* it was not executed"):
            read_checkpoint(path)
        assert not marker.exists()
        # The file is as dangerous as it claims: a plain unpickling would have run it.
        torch.load(path, weights_only=False)
        assert marker.is_dir()
        marker.rmdir()


def test_a_pickled_module_is_refused_by_name(tmp_path) -> None:
    torch.save({"generator": build_generator(CONFIGS[0])}, tmp_path / "net.pt")
    with pytest.raises(SourceError, match=r"asks for adafm_trainer\.models\.gpgan\.Generator"):
        read_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 damaged"])
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=name):
        read_checkpoint(tmp_path / name)


def test_files_that_are_no_checkpoints_are_named(tmp_path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pt")
    refused = (([1, 2], "holds a list"), ({"it": 3}, "holds no generator"), ({"generator": 3}, "'generator'"))
    for content, message in refused:
        torch.save(content, tmp_path / "net.pt")
        with pytest.raises(SourceError, match=message):
            read_checkpoint(tmp_path / "net.pt")


def test_a_truncated_checkpoint_is_named(tmp_path) -> None:
    for legacy in (False, True):
        torch.save(published(CONFIGS[0]), tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
        content = (tmp_path / "net.pt").read_bytes()
        for share in (0.3, 0.9):
            (tmp_path / "net.pt").write_bytes(content[: int(len(content) * share)])
            with pytest.raises(SourceError, match=r"net\.pt cannot be read"):
                read_checkpoint(tmp_path / "net.pt")


def test_differences_are_listed_and_stop_the_conversion_unless_allowed(tmp_path, capsys) -> None:
    cfg, entries = CONFIGS[0], published(CONFIGS[0])
    del entries["generator"]["module.resnet.0.conv_0.bias"]
    entries["generator"]["module.extra"] = torch.zeros(1)
    entries["discriminator"]["module.resnet.2.conv_1.bias"] = torch.zeros(3)
    torch.save(entries, tmp_path / "net.pt")
    assert run(arguments(tmp_path / "net.pt", tmp_path / "out", cfg)) == SourceError.exit_code == 4
    assert not (tmp_path / "out").exists()
    captured = capsys.readouterr()
    assert "1 missing, 1 unexpected, 0 mismatched" in captured.out
    assert "missing     resnet.0.conv_0.bias" in captured.out
    assert "unexpected  extra" in captured.out
    assert "mismatched  resnet.2.conv_1.bias: [3] in the file, [4] in the network" in captured.out
    assert "nothing was written" in captured.err
    assert run(arguments(tmp_path / "net.pt", tmp_path / "out", cfg, allow_mismatch=True)) == 0
    pair = load_pair(tmp_path / "out")
    assert pair.meta["not_loaded"] == {
        "generator": ["resnet.0.conv_0.bias", "extra"],
        "discriminator": ["resnet.2.conv_1.bias"],
    }
    assert torch.equal(pair.generator_state["fc.weight"], entries["generator"]["module.fc.weight"])


def test_the_wrong_family_is_told(tmp_path, capsys) -> None:
    torch.save(published(CONFIGS[2]), tmp_path / "net.pt")
    for arch in ("resnet", "resnet4", "resnet3", "adafm"):
        arguments_ = ConvertArgs(file=tmp_path / "net.pt", out=tmp_path / "out", arch=arch)
        try:
            code = run(arguments_)
        except SourceError as error:
            assert arch in str(error) or "small_style" in str(error)
            code = error.exit_code
        assert code == 4
        assert not (tmp_path / "out").exists()


def test_weights_that_overflow_the_stored_type_are_named(tmp_path) -> None:
    entries = published(CONFIGS[0])
    entries["generator"]["module.fc.weight"][0, 0] = 1e6
    torch.save(entries, tmp_path / "net.pt")
    with pytest.raises(SourceError, match=r"generator\.fc\.weight is not finite as torch\.float16"):
        run(arguments(tmp_path / "net.pt", tmp_path / "out", CONFIGS[0], dtype="float16"))
    assert run(arguments(tmp_path / "net.pt", tmp_path / "out", CONFIGS[0], dtype="bfloat16")) == 0


def test_command_line(tmp_path, capsys) -> None:
    pytest.importorskip("tyro")
    torch.save(published(CONFIGS[2]), tmp_path / "net.pt")
    assert main([str(tmp_path / "net.pt"), "--arch", "resnet2", str(tmp_path / "out")]) == 0
    assert load_pair(tmp_path / "out").cfg == CONFIGS[2]
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out


def test_limits_of_family_resnet_are_told_from_both_networks() -> None:
    wide = ModelConfig("resnet", 256, nf=16)
    for cfg in (wide, dataclasses.replace(wide, nf_max=512), dataclasses.replace(wide, nf_max=64)):
        with torch.device("meta"):
            generator, discriminator = build_generator(cfg).state_dict(), build_discriminator(cfg).state_dict()
        assert infer_config("resnet", {"generator": generator, "discriminator": discriminator}) == cfg


def test_loading_leaves_other_tensors_alone() -> None:
    torch.manual_seed(0)
    module = build_discriminator(CONFIGS[0])
    before = copy.deepcopy(module.state_dict())
    state = {"fc.bias": torch.full((1,), 7.0), "conv_img.bias": torch.zeros(5), "other": torch.zeros(1)}
    report = load_matching(module, state)
    assert report.loaded == ("fc.bias",)
    assert report.unexpected == ("other",)
    assert report.mismatched == (("conv_img.bias", (5,), (2,)),)
    assert set(report.missing) == set(before) - {"fc.bias", "conv_img.bias"}
    assert not report.exact
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name] if name == "fc.bias" else before[name])
