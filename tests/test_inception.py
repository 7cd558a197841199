"""The FID Inception network: its shape, its two departures from the usual one, and the files it accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adafm_trainer.errors import UsageError
from adafm_trainer.metrics.extractors import get_extractor
from adafm_trainer.metrics.inception import InceptionFeatures, load_inception
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = InceptionFeatures().state_dict()
        # Old files carry the classifier and lack the counters.
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        return {**state, "fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}


def test_size_is_the_published_one() -> None:
    # Inception-v3 has 23,834,568 parameters with a classifier of 1000 classes and without the auxiliary head.
    assert sum(p.numel() for p in InceptionFeatures().parameters()) + 2048 * 1000 + 1000 == 23_834_568


def test_features_from_a_file(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    extractor = get_extractor(f"inception:{tmp_path / 'weights.pth'}")
    other = get_extractor(f"inception:{tmp_path / 'weights.safetensors'}")
    assert extractor.hash == other.hash and extractor.name == "inception"
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = extractor(pixels)
    assert features.shape == (2, 2048) and features.dtype == torch.float64 and torch.equal(features, other(pixels))
    network = InceptionFeatures().eval()
    network.load_state_dict(weights, strict=False)
    resized = torch.nn.functional.interpolate(pixels.float(), (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(features, network(resized).double(), rtol=1e-4, atol=1e-6)


def test_stages_have_the_published_shapes() -> None:
    network, shapes = InceptionFeatures().eval(), {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: shapes.__setitem__(name, tuple(o.shape[1:])))
    with torch.no_grad():
        network(torch.zeros(1, 3, 299, 299))
    assert shapes["Conv2d_2b_3x3"] == (64, 147, 147) and shapes["Conv2d_4a_3x3"] == (192, 71, 71)
    assert shapes["Mixed_5b"] == (256, 35, 35) and shapes["Mixed_5d"] == (288, 35, 35)
    assert shapes["Mixed_6a"] == shapes["Mixed_6e"] == (768, 17, 17)
    assert shapes["Mixed_7a"] == (1280, 8, 8) and shapes["Mixed_7c"] == (2048, 8, 8)


@pytest.mark.parametrize(("block", "expected"), [("Mixed_7b", "mean"), ("Mixed_7c", "maximum")])
def test_pooling_of_the_last_blocks(block: str, expected: str) -> None:
    module = getattr(InceptionFeatures(), block).eval()
    inputs = module.branch_pool.conv.in_channels
    with torch.no_grad():
        module.branch_pool.conv.weight.zero_()
        module.branch_pool.conv.weight[0, 0] = 1.0
        x = torch.zeros(1, inputs, 8, 8)
        x[0, 0, 0, 0] = 4.0
        pooled = module(x)[0, -192]
    # In a corner only 4 of the 9 places lie inside the map, and only these count in the mean.
    corner = 1.0 if expected == "mean" else 4.0
    assert pooled[0, 0] == pytest.approx(corner, rel=1e-2)


def test_other_files_are_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(UsageError, match="no Inception weights are at"):
        load_inception(path)
    torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(UsageError, match="1000 classes"):
        load_inception(path)
    torch.save({k: v for k, v in weights.items() if not k.startswith("Mixed_7c.branch1x1")}, path)
    with pytest.raises(UsageError, match="5 of 470 tensors .* 'Mixed_7c.branch1x1.conv.weight'"):
        load_inception(path)
    torch.save({"state": {"a": 1}}, path)
    with pytest.raises(UsageError, match="plain dictionary of tensors"):
        load_inception(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="cannot be read"):
        load_inception(path)
    path.with_suffix(".safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="cannot be read"):
        load_inception(path.with_suffix(".safetensors"))
