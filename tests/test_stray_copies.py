"""bf16 and channels-last from the latent to the logits: every cast, copy and layout change of a map is meant."""

from __future__ import annotations

from collections import Counter

import torch
from adafm_trainer.methods import method_by_name
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.source import SourcePair
from adafm_trainer.trainer.assemble import assemble
from adafm_trainer.trainer.sampling import draw_latents, draw_noise
from tiny import settings
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, SIDE, FIRST = 5, 64, 2
SOURCE = ModelConfig(arch="resnet2", size=SIDE, nf=8, nf_max=64, z_dim=16, embed=0)
COPIES = ("_to_copy", "clone", "copy_", "contiguous")


class Copies(TorchDispatchMode):
    """Counts copies of maps ``[B, C, H, W]`` as (what changed, side of the map, channels are those of an image)."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2]
        if isinstance(out, torch.Tensor) and out.dim() == 4 and out.shape[0] == BATCH and name.split(".")[0] in COPIES:
            source = args[1] if name.startswith("copy_") else args[0]
            changes = []
            if source.dtype != out.dtype:
                changes.append(f"{source.dtype} to {out.dtype}".replace("torch.", ""))
            if self.layout(source) != self.layout(out):
                changes.append(f"{self.layout(source)} to {self.layout(out)}")
            self.found[", ".join(changes) or "copied", out.shape[2], out.shape[1] == 3] += 1
        return out

    @staticmethod
    def layout(map):
        return "last" if map.is_contiguous(memory_format=torch.channels_last) else "first"


def copies(tmp_path, **changes):
    config = settings(tmp_path, precision="bf16", batch=BATCH, r1_interval=1, freeze_g=4, **changes)
    method = method_by_name("adafm")
    torch.manual_seed(0)
    networks = method.structure(method.target_model([SourcePair(SOURCE, {}, None, None, {})], config), config)
    assembly = assemble(method, networks, config)
    generator = networks.generator
    z = draw_latents(generator, 0, "t", 0, range(BATCH))
    noise = draw_noise(generator, 0, "t", 0, range(BATCH))
    real = torch.rand(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    images = assembly.step.generator(z, None, noise).images
    assembly.step.discriminator(real, images)
    with Copies() as of_g:
        images = assembly.step.generator(z, None, noise).images
    with Copies() as of_d:
        assembly.step.discriminator(real, images)
    return of_g.found, of_d.found


# The linear layer takes the last map in the order [C, H, W] that checkpoints have, and gives its gradient back so.
OF_THE_LINEAR_LAYER = {("last to first", FIRST, False): 3}
# Real images and those of a float32 image layer, and the gradient that the penalty squares, with its direction.
CAST_IMAGES = {("float32 to bfloat16", SIDE, True), ("bfloat16 to float32", SIDE, True)}


def test_kept_source_head(tmp_path):
    of_g, of_d = copies(tmp_path)
    # The first map and, one layer further, D's last.
    assert of_g == Counter({("first to last", FIRST, False): 1, ("last to first", FIRST, False): 2})
    images = {key: count for key, count in of_d.items() if key in CAST_IMAGES}
    assert {key: count for key, count in of_d.items() if key not in images} == OF_THE_LINEAR_LAYER
    assert images == {("float32 to bfloat16", SIDE, True): 2, ("bfloat16 to float32", SIDE, True): 1}


def test_new_head(tmp_path):
    """Meant: everything around small_H and AdaIN, and the residual stream behind it, is float32."""
    of_g, of_d = copies(tmp_path, head="new")
    assert sum(count for key, count in of_d.items() if key not in CAST_IMAGES) == 3
    assert all(key in CAST_IMAGES or key in OF_THE_LINEAR_LAYER for key in of_d)
    layouts = {key: count for key, count in of_g.items() if " to " in key[0] and ("last" in key[0])}
    # The head's first map, small_H's output (layer_norm gives [C, H, W]) with its gradient, D's last map.
    assert all(side <= SIDE // 4 for _, side, _ in layouts), layouts
    assert sum(layouts.values()) <= 4, layouts
    casts = {key: count for key, count in of_g.items() if key not in layouts}
    assert set(key[0] for key in casts) <= {"float32 to bfloat16", "bfloat16 to float32"}, casts
    # In the modulated stages: one cast before each branch and one of its gradient, nothing inside a branch.
    for side in (SIDE // 4, SIDE // 2, SIDE):
        for kind in ("float32 to bfloat16", "bfloat16 to float32"):
            assert casts.get((kind, side, False), 0) <= 4, casts


def test_a_copy_would_be_seen(tmp_path, monkeypatch):
    from adafm_trainer.models import blocks

    monkeypatch.setattr(blocks, "lrelu", lambda x: torch.nn.functional.leaky_relu(x.contiguous(), 0.2))
    of_g, _ = copies(tmp_path)
    assert of_g["last to first", SIDE, False] > 0
