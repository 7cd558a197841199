"""GP-GAN families, the AdaFM generator, groups, copying, freezing and pairs on disk."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from adafm_trainer.errors import SourceError
from adafm_trainer.keyed import normal
from adafm_trainer.models.adafm import calibrate, distil_head, head_modules
from adafm_trainer.models.catalogue import groups
from adafm_trainer.models.config import GPGAN_FAMILIES, ModelConfig
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.groups import group_parameters
from adafm_trainer.models.head import AdaIN, SmallH
from adafm_trainer.models.names import from_reference, state_from_reference, state_to_reference, to_reference
from adafm_trainer.models.source import load_pair, save_pair
from adafm_trainer.models.transfer import (
    adapter_parameters,
    block_table,
    copy_source,
    format_block_table,
    freeze,
    modulate_blocks,
)

from adafm_kernels.nn import AdaFMConv2d

SMALL = {
    "resnet": ModelConfig("resnet", 32, nf=4, nf_max=8, z_dim=5),
    "resnet2": ModelConfig("resnet2", 32, nf=2, z_dim=5, embed=3, nlabels=4),
    "resnet3": ModelConfig("resnet3", 64, nf=1, z_dim=5, embed=1, channels=1),
    "resnet4": ModelConfig("resnet4", 64, nf=1, z_dim=5, embed=1),
    "adafm": ModelConfig(
        "adafm", 64, nf=2, nf_max=8, z_dim=5, base="resnet", keep=3, style_dim=6, small_h="calibrated"
    ),
}


def build(cfg: ModelConfig, seed: int = 0):
    torch.manual_seed(seed)
    return build_generator(cfg), build_discriminator(cfg)


def count(module: torch.nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (ModelConfig("resnet2", 128, embed=256, nlabels=1000), (100_535_747, 108_260_776)),
        (ModelConfig("resnet4", 256, embed=1), (52_161_732, 47_952_065)),
        (ModelConfig("resnet3", 256, embed=1), (67_849_284, 59_429_953)),
        (ModelConfig("resnet", 1024, nf=16, nf_max=512, embed=1), (18_810_036, 16_705_201)),
    ],
    ids=lambda value: value.arch if isinstance(value, ModelConfig) else "",
)
def test_published_sizes(cfg: ModelConfig, expected: tuple[int, int]) -> None:
    with torch.device("meta"):
        assert (count(build_generator(cfg)), count(build_discriminator(cfg))) == expected


def test_default_limits_of_family_resnet_differ_between_the_networks() -> None:
    with torch.device("meta"):
        cfg = ModelConfig("resnet", 256, nf=32)
        assert build_generator(cfg).fc.out_features == 512 * 16
        assert build_discriminator(cfg).fc.in_features == 1024 * 16
        limited = dataclasses.replace(cfg, nf_max=64)
        assert build_generator(limited).fc.out_features == build_discriminator(limited).fc.in_features == 64 * 16


def test_gmdn_counts_of_the_published_model() -> None:
    cfg = ModelConfig("resnet2", 128, embed=1)
    trainable_g = [96_101_828, 96_100_096, 95_907_328, 95_136_768, 92_055_552, 79_732_736, 41_979_904, 4_227_072]
    trainable_d = [91_892_161, 91_890_369, 91_697_537, 90_926_849, 87_845_377, 75_522_049, 37_769_217, 16_385]
    for m, (expected_g, expected_d) in enumerate(zip(trainable_g, trainable_d, strict=True)):
        with torch.device("meta"):
            generator, discriminator = build_generator(cfg), build_discriminator(cfg)
        freeze(generator, cfg, m)
        freeze(discriminator, cfg, m)
        assert (count(generator, True), count(discriminator, True)) == (expected_g, expected_d)


@pytest.mark.parametrize(("z_dim", "total", "head"), [(256, 30_092_228, 25_185_793), (4, 27_963_332, 23_056_897)])
def test_counts_of_the_published_adafm_model(z_dim: int, total: int, head: int) -> None:
    cfg = ModelConfig("adafm", 128, z_dim=z_dim, embed=1, base="resnet2")
    with torch.device("meta"):
        generator = build_generator(cfg)
    adapters = adapter_parameters(generator)
    assert count(generator) == total
    assert sum(count(generator.get_submodule(name)) for name in head_modules(generator)) == head
    assert sum(generator.get_parameter(name).numel() for name in adapters) == 860_160
    assert generator.noise_shapes == ((8, 8), (8, 8), (16, 16), (16, 16))
    assert [name for name, _ in groups(generator, cfg)] == ["conv_img", "resnet_5", "resnet_4", "resnet_3", "head"]


@pytest.mark.parametrize(
    ("arch", "size", "sides"),
    [("resnet", 48, "8, 16"), ("resnet2", 48, "32, 64, 96"), ("resnet3", 96, "64, 128"), ("resnet4", 32, "64, 128")],
)
def test_a_side_the_family_cannot_make_names_those_it_can(arch: str, size: int, sides: str) -> None:
    with pytest.raises(ValueError, match=f"size is {size}.*{sides}"):
        ModelConfig(arch, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet5"}, "arch is 'resnet5'"),
        ({"channels": 2}, "channels is 2"),
        ({"embed": -1}, "embed is -1"),
        ({"nf": 0}, "nf is 0"),
        ({"nf": 16, "nf_max": 8}, "nf_max is 8; it must be at least nf, 16"),
        ({"s0": 0}, "s0 is 0"),
        ({"small_h": "large"}, "small_h is 'large'"),
        ({"base": "resnet"}, "belongs to arch adafm"),
        ({"arch": "adafm"}, "base is None"),
    ],
)
def test_an_inadmissible_description_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"arch": "resnet", "size": 32, **changes})


def test_description_survives_json() -> None:
    for cfg in SMALL.values():
        assert ModelConfig.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
    with pytest.raises(ValueError, match="unknown field depth"):
        ModelConfig.from_json({"arch": "resnet", "size": 32, "depth": 3})
    with pytest.raises(ValueError, match="lacks size"):
        ModelConfig.from_json({"arch": "resnet"})


@pytest.mark.parametrize("cfg", SMALL.values(), ids=SMALL)
def test_images_logits_and_gradients(cfg: ModelConfig) -> None:
    generator, discriminator = build(cfg)
    z, y = torch.randn(3, cfg.z_dim), torch.arange(3) % cfg.nlabels
    image = generator(z, y)
    assert image.shape == (3, cfg.channels, cfg.size, cfg.size)
    assert image.abs().max() <= 1
    logits = discriminator(image, y)
    assert logits.shape == (3,)
    logits.sum().backward()
    for network in (generator, discriminator):
        assert [n for n, p in network.named_parameters() if p.requires_grad == (p.grad is None)] == []


@pytest.mark.parametrize("cfg", SMALL.values(), ids=SMALL)
def test_channels_last_gives_the_same_images_in_that_layout(cfg: ModelConfig) -> None:
    cfg = dataclasses.replace(cfg, channels=3, nf=cfg.nf * 2)
    generator, discriminator = (network.double() for network in build(cfg))
    z = torch.randn(2, cfg.z_dim, dtype=torch.float64)
    noise = [torch.randn(2, 1, *shape, dtype=torch.float64) for shape in generator.noise_shapes]
    plain = generator(z, noise=noise)
    logit = discriminator(plain)
    generator.to(memory_format=torch.channels_last)
    discriminator.to(memory_format=torch.channels_last)
    layouts = []
    for module in generator.modules():
        if isinstance(module, (torch.nn.Conv2d, AdaFMConv2d)):
            module.register_forward_hook(lambda _, inputs, __: layouts.append(inputs[0]))
    image = generator(z, noise=noise)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in [*layouts, image])
    torch.testing.assert_close(image, plain)
    torch.testing.assert_close(discriminator(image), logit)


@pytest.mark.parametrize("arch", GPGAN_FAMILIES)
def test_the_join_splits_the_generator_anywhere(arch: str) -> None:
    cfg = SMALL[arch]
    generator, _ = build(cfg)
    z = torch.randn(2, cfg.z_dim)
    stages = len(generator.plan.stages)
    for keep in range(1, stages + 2):
        joined = generator.from_join(generator.activations_at_join(z, None, keep), keep)
        torch.testing.assert_close(joined, generator.pre_tanh(z), rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"keep is {stages + 2}; this generator can keep 1 to {stages + 1}"):
        generator.activations_at_join(z, None, stages + 2)


def test_labels_and_embeddings() -> None:
    cfg = SMALL["resnet2"]
    generator, discriminator = build(cfg)
    z, x = torch.randn(2, cfg.z_dim), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(generator(z), generator(z, torch.tensor([0, 0])))
    assert not torch.allclose(generator(z), generator(z, torch.tensor([1, 2])))
    # The embedding is normalised in this family, so its length has no effect; a float label is the embedding itself.
    own = generator.embedding.weight[torch.tensor([1, 2])]
    torch.testing.assert_close(generator(z, 7 * own), generator(z, torch.tensor([1, 2])))
    assert torch.equal(discriminator(x), discriminator(x, torch.tensor([0, 0])))
    assert discriminator(x, torch.tensor([3, 1]))[1] == discriminator(x, torch.tensor([1, 1]))[1]
    unnormalised, _ = build(SMALL["resnet4"])
    one = torch.ones(2, 1)
    assert not torch.allclose(unnormalised(z, one), unnormalised(z, 7 * one))


def test_wrong_shapes_are_named() -> None:
    generator, discriminator = build(SMALL["resnet"])
    with pytest.raises(ValueError, match=r"z has shape \(2, 4\); expected \[B, 5\]"):
        generator(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 16, 16\); expected \[B, 3, 32, 32\]"):
        discriminator(torch.randn(2, 3, 16, 16))
    adafm, _ = build(SMALL["adafm"])
    with pytest.raises(ValueError, match=r"noise has shapes \[\[2, 1, 4, 4\]\]"):
        adafm(torch.randn(2, 5), noise=[torch.randn(2, 1, 4, 4)])


def test_r1_differentiates_the_discriminator_twice() -> None:
    cfg = ModelConfig("resnet", 8, nf=2, z_dim=3)
    discriminator = build(cfg)[1].double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(discriminator, (x,), atol=1e-6)


@pytest.mark.parametrize("name", [*SMALL])
def test_groups_hold_every_parameter_once(name: str) -> None:
    for network in build(SMALL[name]):
        listed = [n for _, names in groups(network, SMALL[name]) for n, _ in group_parameters(network, names)]
        assert sorted(listed) == sorted(n for n, _ in network.named_parameters())
    assert groups(network, SMALL[name])[0] == ("conv_img", ["conv_img"])


def test_groups_of_another_description_are_refused() -> None:
    generator, _ = build(SMALL["resnet"])
    with pytest.raises(ValueError, match="no module resnet_5_0"):
        groups(generator, SMALL["resnet2"])
    with pytest.raises(ValueError, match="outside every group"):
        groups(generator, dataclasses.replace(SMALL["resnet"], size=16))


def test_freezing_takes_whole_modules_and_no_others() -> None:
    # Blocks 1, 10 and 12 share their first digit; a substring match would take them together.
    cfg = ModelConfig("resnet", 256, nf=2, nf_max=2, z_dim=3)
    generator, discriminator = build(cfg)
    assert freeze(generator, cfg, 3) == ["conv_img", "resnet.12", "resnet.10"]
    assert freeze(discriminator, cfg, 2) == ["conv_img", "resnet.0"]
    frozen = {n.rpartition(".conv_")[0] or "conv_img" for n, p in generator.named_parameters() if not p.requires_grad}
    assert frozen == {"conv_img", "resnet.12", "resnet.10"}
    with pytest.raises(ValueError, match="cannot freeze 10 groups: the Generator has 9"):
        freeze(generator, cfg, 10)


@pytest.mark.parametrize("name", GPGAN_FAMILIES)
def test_modulated_blocks_start_as_the_source_bit_for_bit(name: str) -> None:
    cfg = SMALL[name]
    generator, _ = build(cfg)
    state, z = {n: v.clone() for n, v in generator.state_dict().items()}, torch.randn(2, cfg.z_dim)
    before = generator(z)
    freeze(generator, cfg, 3)
    layers = modulate_blocks(generator, cfg, 3)
    assert torch.equal(generator(z), before)
    assert layers == modulate_blocks(generator, cfg, 3)
    assert all(isinstance(generator.get_submodule(n), AdaFMConv2d) for n in layers)
    assert {n.rpartition(".")[0] for n in adapter_parameters(generator)} == set(layers)
    assert not generator.get_submodule(layers[0]).weight.requires_grad
    assert generator.get_submodule(layers[0]).gamma.requires_grad
    assert generator.load_state_dict(state, strict=False).unexpected_keys == []
    with torch.no_grad():
        generator.get_submodule(layers[0]).gamma.mul_(1.5)
    assert not torch.equal(generator(z), before)


def test_copy_policies() -> None:
    source, _ = build(SMALL["resnet2"], seed=1)
    for policy, left in (("all", set()), ("gmdn", {"fc.weight", "fc.bias", "embedding.weight"})):
        target, _ = build(SMALL["resnet2"], seed=2)
        before = {n: v.clone() for n, v in target.state_dict().items()}
        report = copy_source(target, source.state_dict(), policy)
        assert set(report.left) == left
        for name, value in target.state_dict().items():
            assert torch.equal(value, before[name] if name in left else source.state_dict()[name])
    with pytest.raises(ValueError, match="copy policy is 'some'"):
        copy_source(target, source.state_dict(), "some")
    with pytest.raises(SourceError, match="resnet_0_0.conv_0.weight is .* widths, channels and size must agree"):
        copy_source(build_generator(dataclasses.replace(SMALL["resnet2"], nf=3)), source.state_dict(), "gmdn")
    with pytest.raises(SourceError, match="share no parameter name"):
        copy_source(target, {"other": torch.ones(1)})


def test_the_kept_blocks_of_an_adafm_generator_are_the_sources() -> None:
    cfg = SMALL["adafm"]
    described = dataclasses.replace(cfg, arch="resnet", base=None, small_h="reference")
    source, _ = build(described, seed=1)
    target, _ = build(cfg, seed=2)
    report = copy_source(target, source.state_dict(), "gmdn")
    kept = [n for _, names in groups(target, cfg)[: cfg.keep] for n, _ in group_parameters(target, names)]
    assert set(kept) == set(report.copied) | set(adapter_parameters(target))
    h = source.activations_at_join(torch.randn(2, 5), None, cfg.keep)
    assert h.shape[1:] == (target.join_width, target.join_side, target.join_side)


def test_block_table() -> None:
    cfg = SMALL["resnet"]
    generator, discriminator = build(cfg)
    freeze(generator, cfg, 2)
    modulate_blocks(generator, cfg, 2)
    freeze(discriminator, cfg, 1)
    rows = block_table(generator, discriminator, cfg)
    assert [(r["network"], r["group"], r["state"]) for r in rows[:3]] == [
        ("G", "conv_img", "frozen"),
        ("G", "resnet.6", "adapter"),
        ("G", "resnet.4", "trained"),
    ]
    assert sum(r["parameters"] for r in rows) == count(generator) + count(discriminator)
    assert sum(r["trainable"] for r in rows) == count(generator, True) + count(discriminator, True)
    for name in adapter_parameters(generator):
        generator.get_parameter(name).requires_grad_(False)
    held = block_table(generator, discriminator, cfg)[1]
    assert (held["state"], held["trainable"]) == ("adapter", 0)
    text = format_block_table(rows)
    assert "resnet.6" in text
    assert f"{count(generator):,}" in text
    json.dumps(rows)


def test_names_map_both_ways() -> None:
    generator, _ = build(SMALL["adafm"])
    released = state_to_reference(generator.state_dict())
    assert "resnet.8.small_adafm_1.style_gama" in released
    assert set(state_from_reference(released)) == set(generator.state_dict())
    assert to_reference("resnet_5_0.conv_0.gamma") == "resnet_5_0.small_adafm_0.style_gama"
    assert from_reference("resnet_5_0.small_adafm_1.style_beta") == "resnet_5_0.conv_1.beta"
    assert from_reference("resnet_5_0.conv_0.weight") == "resnet_5_0.conv_0.weight"


def test_small_h_gradients() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    reference, plain = SmallH(3, 4, calibrated=False).double(), SmallH(3, 4, calibrated=True).double()
    with torch.no_grad():
        plain.weight.copy_(reference.weight + 0.01)
        plain.beta.copy_(reference.beta)
    torch.testing.assert_close(reference(x), plain(x))
    assert 990 < reference(x).std() < 1010
    upstream = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    (limited,) = torch.autograd.grad(reference(x), x, upstream)
    (full,) = torch.autograd.grad(plain(x), x, upstream / plain.weight.detach())
    torch.testing.assert_close(limited, 0.01 * full)
    torch.autograd.gradcheck(plain, (x,))


def test_adain_limits_the_gradient_into_its_input_only() -> None:
    layer = AdaIN(2, 3).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    style = torch.zeros(1, 3, dtype=torch.float64)
    upstream = torch.randn(1, 2, 4, 4, dtype=torch.float64)

    def with_gamma(gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            layer.style.linear.bias[:2] = gamma
        y = layer(x, style)
        return y, torch.autograd.grad(y, x, upstream)[0]

    half, one, five = with_gamma(0.5), with_gamma(1.0), with_gamma(5.0)
    torch.testing.assert_close(five[0], 5 * one[0])
    torch.testing.assert_close(five[1], one[1])
    torch.testing.assert_close(half[1], 0.5 * one[1])


def test_noise_is_drawn_afresh_or_taken() -> None:
    generator, _ = build(SMALL["adafm"])
    z = torch.randn(2, 5)
    with torch.no_grad():
        assert not torch.equal(generator(z), generator(z))
        noise = [torch.randn(2, 1, *shape) for shape in generator.noise_shapes]
        assert torch.equal(generator(z, noise=noise), generator(z, noise=noise))


@pytest.mark.parametrize(("keep", "s0", "blocks"), [(2, None, 3), (2, 1, 5), (4, 2, 2), (5, None, 1), (6, None, 1)])
def test_the_head_reaches_any_join(keep: int, s0: int | None, blocks: int) -> None:
    generator, _ = build(ModelConfig("adafm", 64, nf=2, z_dim=3, base="resnet", keep=keep, s0=s0, style_dim=4))
    assert generator(torch.randn(2, 3)).shape == (2, 3, 64, 64)
    assert generator.style_blocks == tuple(f"small_net_{k + 2}" for k in range(blocks))
    assert len(generator.noise_shapes) == 2 * blocks
    assert generator.noise_shapes[-1] == (generator.join_side, generator.join_side)


def test_a_head_that_cannot_reach_its_join_names_the_sides_it_can_start_from() -> None:
    for s0 in (3, 8, 16):
        with pytest.raises(ValueError, match=f"s0 is {s0}; for a join at side 8 it must be one of 1, 2, 4"):
            build_generator(ModelConfig("adafm", 64, nf=2, base="resnet", s0=s0))
    with pytest.raises(ValueError, match="a join at side 1 leaves no room .* keep fewer groups"):
        build_generator(ModelConfig("adafm", 64, nf=1, base="resnet4", keep=8))


def test_calibration_gives_the_head_the_sources_scale() -> None:
    cfg = dataclasses.replace(SMALL["adafm"], nf=4, nf_max=16)
    target, _ = build(cfg)
    source, _ = build(dataclasses.replace(cfg, arch="resnet", base=None, small_h="reference"), seed=3)
    z = normal(0, "latents", 0, range(64), (5,))
    with torch.no_grad():
        calibrate(target, source, z)
        ours, theirs = target.head(z), source.activations_at_join(z, None, cfg.keep)
    torch.testing.assert_close(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    spread = [h.var((2, 3), correction=0).mean(0).sqrt() for h in (ours, theirs)]
    torch.testing.assert_close(spread[0], spread[1], atol=1e-4, rtol=1e-2)
    reference, _ = build(dataclasses.replace(cfg, small_h="reference"))
    with pytest.raises(ValueError, match="small_h is 'reference'"):
        calibrate(reference, source, z)


def test_a_distilled_head_comes_closer_to_the_source_and_touches_nothing_else() -> None:
    cfg = dataclasses.replace(SMALL["adafm"], nf=4, nf_max=16, style_dim=16)
    target, _ = build(cfg)
    source, _ = build(dataclasses.replace(cfg, arch="resnet", base=None, small_h="reference"), seed=3)
    freeze(target, cfg, cfg.keep)
    head = {n for name in head_modules(target) for n, _ in group_parameters(target, [name])}
    before = {n: p.detach().clone() for n, p in target.named_parameters()}
    flags = {n: p.requires_grad for n, p in target.named_parameters()}
    errors: list[float] = []
    settings = {"steps": 60, "batch": 16, "lr": 2e-2}
    last = distil_head(target, source, **settings, progress=lambda done, steps, error: errors.append(error))
    # 1 is the error of a head that puts out the source's mean whatever the latent.
    assert last == errors[-1] < 0.75 < errors[0]
    assert {n: p.requires_grad for n, p in target.named_parameters()} == flags
    assert all(p.grad is None for p in target.parameters())
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in head), name
    again, _ = build(cfg)
    assert distil_head(again, source, **settings) == last
    with pytest.raises(ValueError, match="latents of 5, the source of 6"):
        distil_head(target, build_generator(dataclasses.replace(source.cfg, z_dim=6)))


@pytest.mark.parametrize("small_h", ["reference", "calibrated"])
def test_autocast_leaves_the_stream_behind_small_h_in_float32(small_h: str) -> None:
    cfg = dataclasses.replace(SMALL["adafm"], nf=8, nf_max=32, small_h=small_h)
    generator, _ = build(cfg)
    seen: dict[str, torch.dtype] = {}
    for name, module in generator.named_modules():
        if name:
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.dtype}))
    z, noise = torch.randn(2, 5), [torch.randn(2, 1, *shape) for shape in generator.noise_shapes]
    plain = generator.pre_tanh(z, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        half = generator.pre_tanh(z, noise=noise)
    wide = ["small_H", "resnet.6", "resnet.8", "resnet.6.conv_s", "conv_img"]
    assert {name: seen[name] for name in wide} == dict.fromkeys(wide, torch.float32)
    assert {seen[f"resnet.{i}.conv_{j}"] for i in (6, 8) for j in (0, 1)} == {torch.bfloat16}
    assert (half - plain).abs().max() / plain.abs().max() < 0.05


@pytest.mark.parametrize("name", [*SMALL])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_pair_comes_back_from_disk(tmp_path, name: str, dtype: torch.dtype | None) -> None:
    cfg = SMALL[name]
    generator, discriminator = build(cfg)
    average, _ = build(cfg, seed=1)
    generator.to(memory_format=torch.channels_last)
    save_pair(tmp_path / "pair", cfg, generator, discriminator, average, {"seed": 3}, dtype)
    for path in (tmp_path / "pair", tmp_path / "pair" / "generator.safetensors"):
        pair = load_pair(path)
        assert (pair.cfg, pair.meta) == (cfg, {"seed": 3})
        states = (pair.generator_state, pair.discriminator_state, pair.average_state)
        for network, state in zip((generator, discriminator, average), states, strict=True):
            expected = network.state_dict()
            assert state.keys() == expected.keys()
            for key, value in state.items():
                assert value.dtype == torch.float32
                assert torch.equal(value, expected[key].to(dtype or torch.float32).float())
    save_pair(tmp_path / "pair", cfg, generator, None)
    pair = load_pair(tmp_path / "pair")
    assert pair.discriminator_state is None
    assert pair.average_state is None


def test_a_damaged_pair_is_named(tmp_path) -> None:
    cfg = SMALL["resnet"]
    generator, discriminator = build(cfg)
    with pytest.raises(SourceError, match="no model.json"):
        load_pair(tmp_path)
    with torch.no_grad():
        discriminator.fc.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="discriminator.fc.weight is not finite as torch.float16"):
        save_pair(tmp_path, cfg, generator, discriminator, dtype=torch.float16)
    assert not (tmp_path / "model.json").exists()
    save_pair(tmp_path, cfg, generator, discriminator)
    (tmp_path / "generator.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(SourceError, match=r"generator.safetensors cannot be read"):
        load_pair(tmp_path)
    (tmp_path / "generator.safetensors").unlink()
    with pytest.raises(SourceError, match="has no generator.safetensors"):
        load_pair(tmp_path)
    values = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(SourceError, match="format 2; this version reads format 1"):
        load_pair(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(SourceError, match=r"model.json cannot be read"):
        load_pair(tmp_path)
