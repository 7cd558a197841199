"""KMMD, mean variance and Inception score against their definitions, and the authors' protocol."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adafm_trainer.errors import UsageError
from adafm_trainer.metrics import authors, mmd
from adafm_trainer.metrics.authors import AuthorsProtocol, draw_reals
from adafm_trainer.metrics.diversity import mean_variance
from adafm_trainer.metrics.evaluate import evaluate
from adafm_trainer.metrics.extractors import get_extractor
from adafm_trainer.metrics.frechet import frechet_distance
from adafm_trainer.metrics.inception import InceptionFeatures, load_inception
from adafm_trainer.metrics.inception_score import inception_score
from adafm_trainer.metrics.mmd import dimension_bandwidth, gaussian_mmd2, median_bandwidth


def features(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def images(n: int, seed: int, channels: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("block", [4, 2048])
def test_gaussian_mmd_by_hand(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(mmd, "BLOCK", block)
    x, y, sigma = features(9, 5, 0), features(7, 5, 1, 0.4), 1.7

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * sigma**2))

    cross = 2 * math.fsum(k(a, b) for a, b in product(x, y)) / 63
    own = [math.fsum(k(a, b) for a, b in combinations(s, 2)) for s in (x, y)]
    unbiased = own[0] / (9 * 8 / 2) + own[1] / (7 * 6 / 2) - cross
    biased = (2 * own[0] + 9) / 81 + (2 * own[1] + 7) / 49 - cross
    found = gaussian_mmd2(x, y, sigma)
    assert found.unbiased.value == pytest.approx(unbiased, rel=1e-10)
    assert found.biased.value == pytest.approx(biased, rel=1e-10)
    assert found.unbiased.low < found.unbiased.value < found.unbiased.high


def test_unbiased_means_so_and_biased_is_never_negative() -> None:
    found = [gaussian_mmd2(features(12, 8, 2 * i), features(12, 8, 2 * i + 1), 8**0.5) for i in range(150)]
    values = torch.tensor([f.unbiased.value for f in found])
    assert abs(float(values.mean())) < 3 * float(values.std()) / len(values) ** 0.5
    assert min(f.biased.value for f in found) > 0 and gaussian_mmd2(x := features(5, 3, 0), x, 1.0).biased.value < 1e-15


def test_bandwidths() -> None:
    assert dimension_bandwidth(16) == 4.0 and dimension_bandwidth(16, 0.5) == 2.0
    x, y = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)
    assert median_bandwidth(x, y) == 2.0, "the median of 1, 2 and 3"
    assert median_bandwidth(x[:1].repeat(4, 1), y) == 0.0
    with pytest.raises(ValueError, match="sigma is 0"):
        gaussian_mmd2(x, x, 0.0)


def test_median_of_many_rows_is_near_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(400, 6, 0), features(400, 6, 1)
    whole = median_bandwidth(x, y)
    monkeypatch.setattr(mmd, "MEDIAN_ROWS", 200)
    assert median_bandwidth(x, y) == pytest.approx(whole, rel=0.05) and median_bandwidth(x, y) != whole


def test_mean_variance() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]], dtype=torch.float64)
    assert mean_variance(x) == pytest.approx((4.0 + 3.0) / 2)
    squares = [float((a - b).square().sum()) for a, b in combinations(x, 2)]
    assert 2 * 2 * mean_variance(x) == pytest.approx(2 * sum(squares) / 6), "d MV is half the mean squared distance"
    with pytest.raises(ValueError, match="at least 2 images"):
        mean_variance(x[:1])


def test_inception_score_of_known_sets() -> None:
    sure = torch.eye(5, dtype=torch.float64).repeat(4, 1)
    found = inception_score(sure, 4)
    assert found.mean == pytest.approx(5.0) and found.std == pytest.approx(0.0, abs=1e-12), "one class each, all used"
    assert inception_score(torch.full((20, 5), 0.2, dtype=torch.float64)).mean == pytest.approx(1.0)
    p = torch.softmax(features(23, 6, 0), 1)
    by_hand = []
    for k in range(3):
        part = p[k * 23 // 3 : (k + 1) * 23 // 3]
        by_hand.append(math.exp(float((part * (part.log() - part.mean(0).log())).sum(1).mean())))
    found = inception_score(p, 3)
    mean = sum(by_hand) / 3
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.std == pytest.approx((sum((v - mean) ** 2 for v in by_hand) / 3) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("rows", "splits", "message"),
    [
        (torch.ones(4, 3, dtype=torch.float64), 2, "sum 1"),
        (torch.eye(3, dtype=torch.float64), 4, "4 splits of 3 images"),
        (torch.eye(3, dtype=torch.float64)[0], 1, "must be \\[n, classes\\]"),
        (torch.tensor([[float("nan"), 1.0]], dtype=torch.float64), 1, "sum 1"),
    ],
)
def test_inception_score_refuses(rows: torch.Tensor, splits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_score(rows, splits)


def test_kmmd_root_is_the_published_formula() -> None:
    extractor = get_extractor("random-v1")
    fake, real = extractor(images(7, 0)), extractor(images(5, 1))

    def squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[:, None] - b[None]).square().sum(2)

    scale = squares(real, real).mean()
    pairs = ((real, real), (real, fake), (fake, fake))
    inner, cross, other = (torch.exp(squares(a, b) / (-2 * scale)).mean() for a, b in pairs)
    found = evaluate(fake, real, extractor, split="heldout", log=lambda _: None)["kmmd_root[random-v1]7_heldout"]
    assert found["value"] == pytest.approx((inner + other - 2 * cross).clamp(min=0).sqrt().item(), rel=1e-9)


def test_evaluate_notes_the_bandwidth_and_leaves_equal_pictures_out() -> None:
    extractor, lines = get_extractor("random-v1"), []
    found = evaluate(images(6, 0), images(6, 1), extractor, split="heldout", log=lines.append)
    assert "sigma 30.9839 = sqrt(d), unbiased" in found["kmmd[random-v1]6_heldout"]["note"], "sqrt(960)"
    assert "= median distance, biased" in found["kmmd_median_biased[random-v1]6_heldout"]["note"]
    assert not any(name.startswith("is[") for name in found), "no classifier, no Inception score"
    same = images(1, 2).repeat(6, 1, 1, 1)
    found = evaluate(same, same, extractor, split="heldout", log=lines.append)
    assert "kmmd[random-v1]6_heldout" in found and not any("kmmd_median" in name for name in found)
    assert any("kmmd_median left out: the median distance of all images is 0" in line for line in lines)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights in the layout of torchvision's file; its auxiliary head is one of the tensors passed over."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = InceptionFeatures("torchvision").state_dict()
        head = {"fc.weight": torch.randn(1000, 2048) / 40, "fc.bias": torch.randn(1000)}
        return {**state, **head, "AuxLogits.fc.weight": torch.randn(1000, 768)}


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor]) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception_v3_google.pth"
    torch.save(weights, path)
    return path


def test_torchvision_blocks_average_and_count_padding() -> None:
    for block in ("Mixed_5b", "Mixed_6b", "Mixed_7b", "Mixed_7c"):
        module = getattr(InceptionFeatures("torchvision"), block).eval()
        with torch.no_grad():
            module.branch_pool.conv.weight.zero_()
            module.branch_pool.conv.weight[0, 0] = 1.0
            x = torch.zeros(1, module.branch_pool.conv.in_channels, 8, 8)
            x[0, 0, 0, 0] = 9.0
            pooled = module(x)[0, -module.branch_pool.conv.out_channels]
        assert pooled[0, 0] == pytest.approx(1.0, rel=1e-2), block


def test_authors_protocol_follows_its_definition(weights_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 80 px instead of 299 and batches of 4: the same computation, quicker.
    monkeypatch.setattr(authors, "SIZE", 80)
    monkeypatch.setattr(authors, "BATCH", 4)
    protocol = AuthorsProtocol(weights_file)
    fake, real = images(10, 3).float() / 127.5 - 1.0, images(8, 4).float() / 127.5 - 0.8
    found = protocol.evaluate(fake, real)
    assert found["fid_authors"].n_fake == 8 and found["fid_authors"].n_real == 8, "cut to whole batches"
    network = load_inception(weights_file, "torchvision")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def pooled(x: torch.Tensor, moved: bool) -> torch.Tensor:
        x = F.interpolate(x[:8], size=(80, 80), mode="bilinear", align_corners=False)
        if moved:
            x = torch.stack([x[:, c] * (std[c] / 0.5) + (mean[c] - 0.5) / 0.5 for c in range(3)], 1)
        return network.of_scaled(x).double()

    expected = frechet_distance(pooled(fake, True), pooled(real, True))
    assert found["fid_authors"].value == pytest.approx(expected, rel=1e-4)
    probabilities = torch.softmax(pooled(fake, False) @ network.class_weights.T + network.class_bias, 1)
    assert found["is_authors"].value == pytest.approx(inception_score(probabilities, 8).mean, rel=1e-4)
    with pytest.raises(ValueError, match="batches of 4 images, got 3"):
        protocol.evaluate(fake[:3], real)


def test_colours_are_moved_to_the_stated_range() -> None:
    colours = zip(authors._MEAN, authors._STD, strict=True)
    ends = [x * (s / 0.5) + (m - 0.5) / 0.5 for m, s in colours for x in (-1.0, 1.0)]
    assert ends == pytest.approx([-0.488, 0.428, -0.536, 0.36, -0.638, 0.262], abs=1e-9)


def test_authors_reals_repeat_between_batches_only() -> None:
    pixels = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 4, 4) * 6
    drawn = draw_reals(pixels, 70, seed=3, flip=True)
    assert drawn.shape == (64, 1, 4, 4) and torch.equal(drawn, draw_reals(pixels, 70, seed=3, flip=True))
    which = ((drawn[:, 0].mean((1, 2)) - 1 / 256 + 1.0) * 127.5 / 6).round().int()
    assert all(len(set(batch.tolist())) == 16 for batch in which.split(16)) and len(set(which.tolist())) > 16
    noise = drawn - (which.view(-1, 1, 1, 1) * 6 / 127.5 - 1.0)
    assert -1e-5 < float(noise.min()) and 0.0077 < float(noise.max()) < 1 / 128 + 1e-5
    few = draw_reals(pixels[:10], 32, seed=0, flip=False)
    assert len(few) == 30


def test_authors_weights_are_refused_clearly(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(UsageError, match=r"no Inception weights are at .*weights.pth: give .*inception_v3_google"):
        AuthorsProtocol(path)
    torch.save({k: v for k, v in weights.items() if not k.startswith("fc.")}, path)
    with pytest.raises(UsageError, match="no classifier"):
        AuthorsProtocol(path)
    torch.save({**weights, "fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(UsageError, match="1008 classes; the torchvision network has 1000"):
        AuthorsProtocol(path)


def test_inception_score_of_an_extractor_with_a_classifier(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "fid.pth"
    torch.save({**weights, "fc.weight": torch.randn(1008, 2048) / 40, "fc.bias": 1e3 * torch.randn(1008)}, path)
    extractor = get_extractor(f"inception:{path}")
    rows = features(12, 2048, 0)
    found = evaluate(rows, features(5, 2048, 1), extractor, split="heldout", log=lambda line: None)
    expected = inception_score(torch.softmax(rows @ extractor.class_weights.T, 1), 10)
    assert found["is[inception]12_heldout"]["value"] == pytest.approx(expected.mean), "without the output bias"
    assert found["is_std[inception]12_heldout"]["value"] == pytest.approx(expected.std)
    assert "10 splits of 12 images" in found["is[inception]12_heldout"]["note"]
    with pytest.raises(ValueError, match="random-v1 has no classifier"):
        get_extractor("random-v1").class_probabilities(features(2, 960, 0))
