"""Cases of GAN memory's networks: block_memory_, memory_generator, memory_generator_classcond and _multitask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from adafm_trainer.models.blocks import ResBlock
from adafm_trainer.models.memory import (
    ARCHITECTURE,
    MemoryDiscriminator,
    MemoryGenerator,
    load_source,
    modulated_layers,
    modulation_parameters,
)
from adafm_trainer.models.memory_bank import MemoryBank
from adafm_trainer.models.memory_config import MemoryConfig
from adafm_trainer.models.memory_layers import ShiftedConv2d
from adafm_trainer.models.memory_mixed import MixedTaskGenerator
from adafm_trainer.models.memory_names import state_from_reference, state_to_reference, to_reference
from torch import Tensor, nn

from .compare import GoldenFile
from .layers import gradients, penalty

# The reference reads its images for the Frechet distance at this side, and the file has every so many of its pixels.
EVALUATION_SIDE, PIXEL_STEP = 128, 16


def block(golden: GoldenFile) -> dict[str, Tensor]:
    x = golden.get("in.x").requires_grad_()
    module = ResBlock(golden.config["fin"], golden.config["fout"], conv=ShiftedConv2d)
    module.to(x.dtype).requires_grad_(True)
    module.load_state_dict(state_from_reference(golden.under("in.param.")))
    y = module(x)
    names = {to_reference(name): parameter for name, parameter in module.named_parameters()}
    return {"out.y": y} | gradients(golden, y, x, names) | penalty(golden, y, x, names)


def unconditional(golden: GoldenFile) -> dict[str, Tensor]:
    results = _generator(golden)
    state = golden.under("in.D.")
    cfg = _config(golden, {})
    image, y = results["out.source.image"].detach(), golden.get("in.y")
    raw = _loaded(MemoryDiscriminator(cfg), state, image.dtype)
    results["out.D.logit"] = raw(image, y)
    normalised = MemoryDiscriminator(_config(golden, {}, normalise_d=True)).to(image.dtype)
    load_source(normalised, _source(state))
    results["out.D.norm.logit"] = normalised(image, y)
    return results


def classes(golden: GoldenFile) -> dict[str, Tensor]:
    return _generator(golden)


def multitask(golden: GoldenFile) -> dict[str, Tensor]:
    """Each task from the bank, each twice: alone and all of them in one batch, in turns."""
    z, y = golden.get("in.z"), golden.get("in.y")
    generator, results = _source_generator(golden)
    source = _source(golden.under("in.G."))
    bank = MemoryBank(generator.memory, source)
    names = [f"task{t}" for t in range(golden.config["tasks"])]
    for name in names:
        generator.load_state_dict(state_from_reference(golden.under(f"in.{name}.")), strict=False)
        bank.add(name, generator)
    results["out.current.image"] = generator(z, y)
    mixed = MixedTaskGenerator(bank)
    turns = [name for _ in z for name in names]
    images = mixed(z.repeat_interleave(len(names), 0), turns, y.repeat_interleave(len(names), 0))
    for t, name in enumerate(names):
        recalled = bank.generator(name)(z, y)
        torch.testing.assert_close(images[t :: len(names)], recalled, rtol=0, atol=1e-6)
        results[f"out.{name}.image"] = recalled
    return results


def _generator(golden: GoldenFile) -> dict[str, Tensor]:
    """Source, normalised and modulated generator, and the gradients of the modulation."""
    z, y = golden.get("in.z"), golden.get("in.y")
    generator, results = _source_generator(golden)
    norm = state_to_reference(generator.state_dict())
    results |= {key: norm[key.removeprefix("out.norm.")] for key in golden.expected if _is_norm(key)}
    results = {key: value.detach().clone() for key, value in results.items()}
    task = state_from_reference(golden.under("in.task0."))
    assert set(task) == set(modulation_parameters(generator))
    generator.load_state_dict(task, strict=False)
    image = generator(z, y)
    side = F.interpolate(image, (EVALUATION_SIDE, EVALUATION_SIDE), mode="nearest")
    results |= {"out.task0.image": image, "out.task0.image_fid128": side[:, :, ::PIXEL_STEP, ::PIXEL_STEP]}
    names = {name: parameter for name, parameter in generator.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(image, list(names.values()), golden.get("in.gy"))
    named = state_to_reference(dict(zip(names, found, strict=True)))
    return results | {f"out.grad.{name}": gradient for name, gradient in named.items()}


def _source_generator(golden: GoldenFile) -> tuple[MemoryGenerator, dict[str, Tensor]]:
    """The generator as it is loaded from the source, and the images of the source and of that."""
    z, y, state = golden.get("in.z"), golden.get("in.y"), golden.under("in.G.")
    cfg = _config(golden, state)
    raw = _loaded(MemoryGenerator(cfg), state, z.dtype)
    for _, layer in modulated_layers(raw):
        assert (layer.gamma == 1).all() and (layer.beta == 0).all()
    generator = MemoryGenerator(cfg).to(z.dtype)
    load_source(generator, _source(state))
    biases = {name: value for name, value in state_from_reference(state).items() if name.startswith("class_bias.")}
    generator.load_state_dict(biases, strict=False)
    return generator, {"out.source.image": raw(z, y), "out.norm.image": generator(z, y)}


def _config(golden: GoldenFile, state: Mapping[str, Tensor], **changes: object) -> MemoryConfig:
    """Told from the generator's tensors, with the sizes that the file states."""
    sizes = golden.config
    conditional = sizes["kind"] != "uncond"
    if not state:
        state = golden.under("in.G.")
    cfg = ARCHITECTURE.infer("memory", {"generator": ARCHITECTURE.rename("generator", dict(state))})
    assert (cfg.source.nf, cfg.z_dim, cfg.size) == (sizes["nf"], sizes["z"], sizes["size"])
    assert cfg.classes == (sizes["nlabels"] if conditional else 0)
    return MemoryConfig(**{**{name: getattr(cfg, name) for name in cfg.__dataclass_fields__}, **changes})


def _source(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a GP-GAN source has."""
    renamed = state_from_reference(state)
    own = (".gamma", ".beta", ".shift")
    return {n: v for n, v in renamed.items() if not n.endswith(own) and not n.startswith("class_bias.")}


def _loaded(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    module.to(dtype).load_state_dict(ARCHITECTURE.rename("", dict(state)))
    return module


def _is_norm(key: str) -> bool:
    return key.startswith("out.norm.") and key != "out.norm.image"
