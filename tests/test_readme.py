"""Every command and every snippet of README.md runs, with few steps."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adafm_trainer import cli
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.wgan_config import WganResNetConfig
from foreign import DCGenerator
from tiny import image_folder, source_folder
from torch import nn

import adafm_kernels

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[str]:
    plain = [block for language, block in blocks(text) if not language]
    return [line.split("#")[0].strip() for block in plain for line in block.splitlines() if line.startswith("adafm ")]


BLOCKS, COMMANDS = blocks(README), commands(README)
SHORT = {
    "train": ["--steps", "2", "--tick", "2", "--snap", "5", "--eval-every", "-1", "--batch", "2"],
    "pretrain": ["--steps", "2", "--tick", "2", "--snap", "5", "--eval-every", "-1", "--batch", "2", "--nf", "8"],
    "eval": ["--samples", "6", "--extractor", "random-v1"],
    "bench": ["--quick", "--rounds", "1", "--cases", "adafm-128", "--ways", "leaf"],
}


def python_blocks():
    return [block for language, block in BLOCKS if language == "python"]


def test_readme_has_what_it_promises():
    assert len(COMMANDS) >= 10 and len(python_blocks()) == 4
    used = {shlex.split(command)[1] for command in COMMANDS}
    assert {"train", "sample", "interpolate", "eval", "pretrain", "convert", "doctor"} <= used
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_commands_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, folder in enumerate(("my_images", "many_images", "held_out_images", "other_images")):
        image_folder(tmp_path / folder, seed=seed)
    for k, name in enumerate(("a", "b")):
        source_folder(tmp_path / "sources" / name, ModelConfig("resnet", 16, nf=4 + k, nf_max=8, z_dim=5 + k))
    model = ModelConfig(arch="resnet4", size=64, nf=4, z_dim=8, embed=1)
    networks = {"generator": build_generator(model), "discriminator": build_discriminator(model)}
    states = {k: {f"module.{n}": v for n, v in m.state_dict().items()} for k, m in networks.items()}
    torch.save(states, "celeba-ab478c9d.pt")
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        extra = [] if "--resume" in words else SHORT.get(words[0], [])
        assert cli.main([*words, *extra]) == 0, command
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "strip.png").is_file()
    assert (tmp_path / "sources" / "celeba" / "model.json").is_file()


def test_commands_of_the_methods_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, folder in enumerate(("my_images", "flowers", "cats", "classes/x", "classes/y", "classes/z")):
        image_folder(tmp_path / folder, 6, seed=seed)
    for name in ("wgan", "other"):
        source_folder(tmp_path / "sources" / name, WganResNetConfig(size=16, dim=2, z_dim=6))
    shutil.copytree(ROOT / "docs" / "recipes", tmp_path / "docs" / "recipes")
    for command in commands(METHODS):
        words = shlex.split(command)[1:]
        fewer = ["--subset", "4"] if "--config" in words else []
        assert cli.main([*words, *SHORT.get(words[0], []), *fewer]) == 0, command
    assert (tmp_path / "tasks.png").is_file() and (tmp_path / "runs" / "conditional" / "report.html").is_file()


def test_miners_serve_any_generator():
    (block,) = re.findall(r"^```python\n(.*?)^```", METHODS, re.S | re.M)
    given = {}

    def generator(z, noise, constant):
        given.update(z=z, noise=noise, constant=constant)
        return constant.mean((1, 2, 3)) + z.mean(1) + sum(m.mean((1, 2, 3)) for m in noise)

    names = {"torch": torch, "generator": generator}
    exec(block, names)
    assert given["z"].shape == (8, 512) and given["constant"].shape == (8, 512, 4, 4)
    assert [tuple(m.shape) for m in given["noise"]] == [(8, 1, side, side) for side in (4, 8, 16, 32)]
    names["images"].sum().backward()
    miners = [names[name] for name in ("codes", "maps", "constant")]
    assert all(p.grad is not None for miner in miners for p in miner.parameters())


def test_equivalent_of_modulate():
    signature, equivalent = python_blocks()[0].split("# equivalent to")
    names = {"weight": torch.randn(4, 3, 3, 3), "gamma": torch.randn(4, 3), "beta": torch.randn(4, 3)}
    names.update(dtype=torch.bfloat16, memory_format=torch.channels_last)
    plain = eval(equivalent.strip(), dict(names))
    fused = adafm_kernels.modulate(
        names["weight"], names["gamma"], names["beta"], dtype=torch.bfloat16, memory_format=torch.channels_last
    )
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-2)
    assert signature.strip().startswith("adafm_kernels.modulate(weight, gamma, beta, *, dtype=None, memory_format=None")


def test_swap_a_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

    net, x = Net(), torch.randn(2, 3, 8, 8)
    before = net.conv(x)
    scope = {"net": net}
    first, last = python_blocks()[1].split("# ...", 1)
    exec(first, scope)
    assert torch.equal(net.conv(x), before) and not net.conv.weight.requires_grad
    with torch.no_grad():
        net.conv.gamma.mul_(1.5)
    changed = net.conv(x)
    exec(last.split("\n", 1)[1], scope)
    assert type(net.conv) is nn.Conv2d and torch.equal(net.conv(x), changed)


def test_swap_the_layers_of_a_gan_that_is_not_ours():
    torch.manual_seed(0)
    netG, z = DCGenerator(), torch.randn(4, 8, 1, 1)
    before = netG(z)
    scope = {"netG": netG}
    first, last = python_blocks()[2].split("# ...", 1)
    exec(first, scope)
    assert torch.equal(netG(z), before)
    trained = {name for name, parameter in netG.named_parameters() if parameter.requires_grad}
    assert trained == {f"main.{place}.{kind}" for place in (0, 3, 6) for kind in ("gamma", "beta")}
    with torch.no_grad():
        netG.main[3].gamma.mul_(1.5)
    changed = netG.eval()(z)
    exec(last.split("\n", 1)[1], scope)
    assert type(netG.main[3]) is nn.ConvTranspose2d and torch.equal(scope["netG"](z), changed)


def test_train_a_whole_network_at_once():
    torch.manual_seed(0)
    netG, plain = (adafm_kernels.inject(DCGenerator()) for _ in range(2))
    plain.load_state_dict(netG.state_dict())
    batches = [torch.randn(4, 8, 1, 1) for _ in range(2)]

    def loss(images):
        return images.float().square().mean()

    trained = [p for p in netG.parameters() if p.requires_grad]
    scope = {"netG": netG, "batches": batches, "loss": loss, "torch": torch, "optimizer": torch.optim.SGD(trained, 0.5)}
    with torch.autocast("cpu", torch.bfloat16):
        exec(python_blocks()[3], scope)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], 0.5)
    for z in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss(plain(z)).backward()
        optimizer.step()
    for (name, found), want in zip(netG.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(netG.main[3].gamma, torch.ones_like(netG.main[3].gamma))


@pytest.mark.parametrize("word", ["TODO", "@DEMO", "@BENCH"])
def test_readme_is_finished(word):
    assert word not in README


@pytest.mark.parametrize("name", ["op_cpu.json", "step_cpu.json"])
def test_the_tables_are_those_of_the_committed_results(name):
    result = ROOT / "benchmarks" / "results" / name
    command = [sys.executable, "benchmarks/render.py", str(result)]
    rendered = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    missing = [line for line in rendered.splitlines() if line not in README]
    assert not missing, f"render benchmarks/results/{name} into README.md again: {missing[0]}"
