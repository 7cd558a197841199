"""Augmentation: exact where nothing is drawn, the papers' formulas where it is, and two derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from adafm_trainer.data.bundled import bundled
from adafm_trainer.data.grid import make_grid
from adafm_trainer.data.images import load_image_set
from adafm_trainer.data.prepare import prepare
from adafm_trainer.errors import UsageError
from adafm_trainer.methods.augment import NAMES, make_augment
from adafm_trainer.methods.augment_geometry import Resampler, mirrored
from adafm_trainer.methods.losses import gradient_penalty
from augmenting import ada, bits, column, images, only, with_values
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

BLIT = ("flip", "turn", "move")
WARP = ("scale", "rotate_before", "stretch", "rotate_after", "shift")


# Draws


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_keyed_and_do_not_depend_on_the_batch_split(name):
    augment = make_augment(name, 3, 8)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = augment.draw(3, 7, range(10), "real")
    assert torch.equal(torch.get_rng_state(), before)
    parts = [augment.draw(3, 7, rows, "real") for rows in (range(4), [4], torch.arange(5, 10))]
    assert torch.equal(whole, torch.cat(parts)) and whole.dtype == torch.float32
    assert augment.draw(3, 7, [], "real").shape == (0, whole.shape[1])
    for other in ((4, 7, "real"), (3, 8, "real"), (3, 7, "fake"), (3, 7, "generator")):
        assert not (augment.draw(other[0], other[1], range(10), other[2]) == whole).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_parts_of_a_batch_are_transformed_as_the_whole(name, channels):
    augment = make_augment(name, channels, 9)
    if name == "ada":
        augment.p.fill_(0.5)
    x = images(12, channels, 9, torch.float32)
    draws = augment.draw(0, 0, range(12), "real")
    whole = augment(x, draws)
    cut = torch.cat([augment(x[part], draws[part]) for part in (slice(0, 5), slice(5, 6), slice(6, 12))])
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(whole, x)


def test_uniform_draws_are_in_their_range_and_normal_ones_are_normal():
    augment = ada(0.0)
    draws = augment.draw(0, 0, range(3000), "real").double()
    uniform, normal = draws.split([len(augment.uniforms), len(augment.normals)], 1)
    assert uniform.min() >= 0 and uniform.max() < 1 and (uniform.mean(0) - 0.5).abs().max() < 0.03
    assert normal.mean(0).abs().max() < 0.1 and (normal.std(0) - 1).abs().max() < 0.06


# Identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nothing_changes_at_probability_zero(dtype, channels, layout):
    x = images(6, channels, 8, dtype)
    x[0, 0, :2] = -0.0
    x[1, 0, 0, 0], x[2] = 1e-40, 1.0
    x = x.contiguous(memory_format=layout)
    for name in ("ada",):
        augment = make_augment(name, channels, 8)
        out = augment(x, augment.draw(0, 0, range(6), "real"))
        assert torch.equal(bits(out), bits(x)) and out.dtype == dtype and out.stride() == x.stride()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_type_and_layout_stay_under_autocast_too(name, dtype):
    augment = make_augment(name, 3, 8)
    if name == "ada":
        augment.p.fill_(1.0)
    x = images(4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    draws = augment.draw(0, 0, range(4), "real")
    plain = augment(x, draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = augment(x, draws)
    assert torch.equal(plain, cast) and plain.dtype == dtype
    assert plain.is_contiguous(memory_format=torch.channels_last)


def test_an_image_that_draws_nothing_stays_though_others_change():
    augment = ada(0.12)
    x = images(64, dtype=torch.float32)
    draws = augment.draw(1, 0, range(64), "real")
    still = (draws[:, : len(augment.gates)] >= 0.12).all(1)
    same = (augment(x, draws) == x).flatten(1).all(1)
    assert 0 < still.sum() < 64 and same[still].all() and not same.all()


# Whole pixels


@pytest.mark.parametrize("size", [7, 8])
def test_flips_and_quarter_turns_are_exact(size):
    augment, x = ada(1.0, size=size), images(8, size=size)
    draws = only(augment, augment.draw(0, 0, range(8), "real"), "flip", "turn")
    draws = with_values(augment, draws, flip=[0.1, 0.9] * 4, turn=[0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 0.8, 0.99])
    out = augment(x, draws)
    for i in range(8):
        flipped = x[i].flip(2) if i % 2 == 0 else x[i]
        assert torch.equal(out[i], torch.rot90(flipped, i // 2, (1, 2)))


@pytest.mark.parametrize("size", [16, 17])
def test_moves_by_whole_pixels_are_exact_and_mirror_the_edge(size):
    augment, x = ada(1.0, size=size), images(9, size=size)
    ends = [(a, b) for a in (0.0, 0.5, 0.9999) for b in (0.0, 0.5, 0.9999)]
    draws = only(augment, augment.draw(0, 0, range(9), "real"), "move")
    draws = with_values(augment, draws, move_x=[a for a, _ in ends], move_y=[b for _, b in ends])
    out, reach = augment(x, draws), round(size / 8)
    padded = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    for i, (a, b) in enumerate(ends):
        dx, dy = (round((2 * u - 1) * size / 8) for u in (a, b))
        top, left = reach - dy, reach - dx
        assert torch.equal(out[i], padded[i, :, top : top + size, left : left + size])


def test_moves_reach_evenly_over_an_eighth():
    augment = ada(1.0, 1, 16)
    x = torch.arange(16.0).expand(1, 1, 16, 16).expand(2000, 1, 16, 16)
    out = augment(x, only(augment, augment.draw(0, 0, range(2000), "real"), "move"))
    counts = torch.bincount((8 - out[:, 0, 8, 8]).long() + 2, minlength=5)
    assert len(counts) == 5
    assert (counts[1:-1] - 500).abs().max() < 80 and (counts[[0, -1]] - 250).abs().max() < 60


# Resampling


@pytest.mark.parametrize("size", [2, 3, 8, 13])
def test_down_after_up_is_the_identity(size):
    resampler, x = Resampler(size, torch.device("cpu")), images(2, size=size)
    identity = torch.eye(3, dtype=torch.float64)[None, :2].expand(2, 2, 3)
    torch.testing.assert_close(resampler.warp(x, identity), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [7, 8])
def test_the_resampling_agrees_with_exact_pixel_moves(size):
    resampler, x = Resampler(size, torch.device("cpu")), images(8, size=size)
    flip, turns = torch.tensor([False, True] * 4), torch.arange(8) // 2
    shift = torch.tensor([[0, 0], [1, 0], [0, 2], [-2, 1], [3, -3], [20, 0], [0, -31], [5, 5]])
    inverse = []
    for f, k, by in zip(flip, turns, shift, strict=True):
        c, s = (round(g(int(k) * math.pi / 2)) for g in (math.cos, math.sin))
        forward = torch.tensor([[1, 0, by[0]], [0, 1, by[1]], [0, 0, 1]], dtype=torch.float64)
        # Counterclockwise as seen, with y down.
        forward = forward @ torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=torch.float64)
        forward = forward @ torch.diag(torch.tensor([-1.0 if f else 1.0, 1.0, 1.0], dtype=torch.float64))
        inverse.append(torch.linalg.inv(forward)[:2])
    moved, warped = resampler.move(x, flip, turns, shift), resampler.warp(x, torch.stack(inverse))
    torch.testing.assert_close(warped, moved, rtol=0, atol=1e-12)


def test_mirrored_indices_go_on_for_ever():
    assert mirrored(torch.arange(-5, 10), 4).tolist() == [1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3]


def blob(size, centre, sigma, dtype=torch.float64):
    """A Gaussian around ``centre``, (x, y) from the image's centre, with the covariance ``sigma``."""
    at = torch.arange(size, dtype=dtype) - (size - 1) / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    away = torch.stack([x, y], -1) - torch.as_tensor(centre, dtype=dtype)
    return (-0.5 * torch.einsum("hwi,ij,hwj->hw", away, torch.linalg.inv(sigma), away)).exp()


def test_geometry_is_the_papers_sequence_of_maps():
    # A Gaussian under an affine map is a Gaussian: no resampling in the expected picture.
    size, augment = 48, ada(1.0, 1, 48)
    count = 12
    draws = augment.draw(5, 0, range(count), "real").double()
    draws[:, len(augment.uniforms) :] *= 0.5
    draws = only(augment, draws, *BLIT, *WARP)
    start, spread = torch.tensor([6.0, 3.0]).double(), torch.diag(torch.tensor([20.0, 8.0])).double()
    out = augment(blob(size, start, spread).expand(count, 1, size, size), draws)
    take = {name: draws[:, column(augment, name)] for name in (*augment.uniforms, *augment.normals)}
    for i in range(count):
        u = {name: float(value[i]) for name, value in take.items()}
        a, b = torch.eye(2).double(), torch.zeros(2).double()

        def then(matrix, shift=(0.0, 0.0)):
            nonlocal a, b
            matrix = torch.tensor(matrix).double()
            a, b = matrix @ a, matrix @ b + torch.tensor(shift).double()

        def turn(angle):
            then([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])

        identity = [[1.0, 0.0], [0.0, 1.0]]
        then([[-1.0 if u["flip"] < 0.5 else 1.0, 0.0], [0.0, 1.0]])
        turn(math.pi / 2 * int(4 * u["turn"]))
        then(identity, [round((2 * u[f"move_{c}"] - 1) * 0.125 * size) for c in "xy"])
        s = math.exp(u["scale"] * 0.2 * math.log(2))
        then([[s, 0.0], [0.0, s]])
        turn((2 * u["rotate_before"] - 1) * math.pi)
        s = math.exp(u["stretch"] * 0.2 * math.log(2))
        then([[s, 0.0], [0.0, 1 / s]])
        turn((2 * u["rotate_after"] - 1) * math.pi)
        then(identity, [u[f"shift_{c}"] * 0.125 * size for c in "xy"])
        expected = blob(size, a @ start + b, a @ spread @ a.T)
        difference = (out[i, 0] - expected)[8:-8, 8:-8].abs().max()
        assert difference < 0.02, (i, difference)


def test_rotating_there_and_back_loses_little():
    # Bilinear look-ups alone, without the denser grid between the filters, lose several times as much.
    size, angle = 32, 0.7
    x = F.interpolate(images(4, size=11), size=(size, size), mode="bicubic", align_corners=True)
    c, s = math.cos(angle), math.sin(angle)
    there = torch.tensor([[c, -s, 0], [s, c, 0]], dtype=torch.float64).expand(4, 2, 3)
    back = torch.tensor([[c, s, 0], [-s, c, 0]], dtype=torch.float64).expand(4, 2, 3)
    resampler, inner = Resampler(size, torch.device("cpu")), slice(10, -10)

    def plain(x, inverse):
        return F.grid_sample(x, F.affine_grid(inverse, x.shape, align_corners=True), "bilinear", "reflection", True)

    def lost(warp):
        return (warp(warp(x, there), back) - x)[..., inner, inner].square().mean().sqrt()

    assert lost(resampler.warp) < 0.4 * lost(plain)


# Colour


def test_colour_is_the_papers_sequence_of_matrices():
    augment, x, count = ada(1.0), images(10), 10
    draws = only(
        augment, augment.draw(2, 0, range(count), "real"), "brightness", "contrast", "luma", "hue", "saturation"
    )
    out = augment(x, draws)
    v = torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64)
    cross = torch.tensor([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    for i in range(count):
        u = {name: float(draws[i, column(augment, name)]) for name in (*augment.uniforms, *augment.normals)}
        pixels = x[i].flatten(1) + 0.2 * u["brightness"]
        pixels = pixels * math.exp(0.5 * math.log(2) * u["contrast"])
        if u["luma"] < 0.5:
            pixels = (eye - 2 * torch.outer(v, v)) @ pixels
        pixels = torch.linalg.matrix_exp((2 * u["hue"] - 1) * math.pi * cross) @ pixels
        scale = math.exp(math.log(2) * u["saturation"])
        pixels = (torch.outer(v, v) + (eye - torch.outer(v, v)) * scale) @ pixels
        torch.testing.assert_close(out[i].flatten(1), pixels, rtol=0, atol=1e-6)


def test_grey_images_are_coloured_as_grey_colour_images():
    colour, grey = ada(1.0), ada(1.0, channels=1)
    x = images(10, channels=1)
    draws = colour.draw(2, 0, range(10), "real")
    expected = colour(x.expand(-1, 3, -1, -1), draws)
    torch.testing.assert_close(expected, grey(x, draws).expand(-1, 3, -1, -1), rtol=0, atol=1e-10)
    muted = only(grey, draws, "hue", "saturation")
    assert torch.equal(grey(x, muted), x)


# Statistics


@pytest.mark.parametrize(
    ("gates", "share"),
    [
        (["flip"], 0.5),
        (["turn"], 0.75),
        (["scale"], 1.0),
        (["rotate_before", "rotate_after"], 1.0),
        (["stretch"], 1.0),
        (["shift"], 1.0),
        (["brightness"], 1.0),
        (["contrast"], 1.0),
        (["luma"], 0.5),
        (["hue"], 1.0),
        (["saturation"], 1.0),
    ],
)
def test_each_transform_is_applied_with_probability_p(gates, share):
    p, count = 0.4, 3000
    augment = ada(p, size=4)
    x = images(1, size=4, dtype=torch.float32).expand(count, -1, -1, -1)
    out = augment(x, only(augment, augment.draw(0, 3, range(count), "fake"), *gates))
    changed = (out != x).flatten(1).any(1).double().mean()
    assert abs(changed - share * p) < 4 * math.sqrt(0.25 / count)


# DiffAugment


@pytest.mark.parametrize("size", [8, 9, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_diffaug_is_the_papers_formulas(size, channels):
    augment, count = make_augment("diffaug", channels, size), 20
    x, draws = images(count, channels, size), make_augment("diffaug", channels, size).draw(0, 0, range(20), "real")
    out = augment(x, draws)
    reach, side = round(size / 8), math.ceil(size / 2)
    for i in range(count):
        u = {name: float(draws[i, column(augment, name)]) for name in augment.uniforms}
        y = x[i] + (u["brightness"] - 0.5)
        y = y.mean(0) + 2 * u["saturation"] * (y - y.mean(0))
        y = y.mean() + (0.5 + u["contrast"]) * (y - y.mean())
        dx, dy = (int(u[f"shift_{c}"] * (2 * reach + 1)) - reach for c in "xy")
        y = F.pad(y, (reach, reach, reach, reach))[..., reach - dy :, reach - dx :][..., :size, :size]
        places = size + 1 if side % 2 == 0 else size
        left, top = (int(u[f"cut_{c}"] * places) - side // 2 for c in "xy")
        y = y.clone()
        y[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
        torch.testing.assert_close(out[i], y, rtol=0, atol=1e-6)


def test_diffaug_shifts_and_cuts_evenly():
    augment, count = make_augment("diffaug", 1, 16), 4000
    draws = with_values(augment, augment.draw(0, 0, range(count), "real"), brightness=0.5, saturation=0.5, contrast=0.5)
    ramp = (1.0 + torch.arange(16.0)).expand(count, 1, 16, 16)
    out = augment(ramp, draws)[:, 0]
    column_of = out[:, :, 8].amax(1)
    shifts = torch.bincount((9 - column_of[column_of > 0]).round().long() + 2, minlength=5)
    assert len(shifts) == 5 and shifts.min() > 0.8 * shifts.sum() / 5
    hidden = (augment(torch.ones(count, 1, 16, 16), draws)[:, 0] == 0).double().mean(0)
    inner = hidden[4:12, 4:12]
    assert (hidden - hidden.flip(0)).abs().max() < 0.06 and (hidden - hidden.flip(1)).abs().max() < 0.06
    assert inner.max() - inner.min() < 0.06


# Derivatives


@pytest.mark.parametrize("name", ["diffaug", "ada"])
@pytest.mark.parametrize("channels", [1, 3])
def test_two_derivatives_with_respect_to_the_images(name, channels):
    augment = make_augment(name, channels, 4)
    if name == "ada":
        augment.p.fill_(0.8)
    draws = augment.draw(3, 0, range(2), "real")
    x = images(2, channels, 4).requires_grad_()

    def curved(x):
        return augment(x, draws).pow(3)

    assert gradcheck(curved, (x,)) and gradgradcheck(curved, (x,))


@pytest.mark.parametrize("name", ["diffaug", "ada"])
def test_the_gradient_penalty_goes_through_the_augmentation(name):
    augment = make_augment(name, 1, 6)
    if name == "ada":
        augment.p.fill_(1.0)
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(64, 1)).double()
    draws, x = augment.draw(0, 0, [0], "real"), images(1, 1, 6).requires_grad_()
    penalty = gradient_penalty(judge(augment(x, draws))[:, 0], x).mean()
    found = torch.autograd.grad(penalty, tuple(judge.parameters()), allow_unused=True)

    # The augmentation is affine in the image, diffaug too: J is the same everywhere.
    jacobian = torch.autograd.functional.jacobian(lambda x: augment(x, draws), x.detach()).view(36, 36)
    seen = augment(x, draws).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(judge(seen).sum(), seen, create_graph=True)
    by_hand = (gradient.flatten() @ jacobian).square().sum()
    torch.testing.assert_close(penalty, by_hand, rtol=1e-10, atol=0)
    expected = torch.autograd.grad(by_hand, tuple(judge.parameters()), allow_unused=True)
    assert expected[0].abs().max() > 0
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)


# What must not happen on the host


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_read_on_the_host(name):
    # Fake tensors have no values: reading one raises.
    with FakeTensorMode():
        augment = make_augment(name, 3, 8)
        columns = len(augment.uniforms) + len(augment.normals)
        x = torch.rand(4, 3, 8, 8, requires_grad=True)
        out = augment(x, torch.rand(4, columns))
        assert out.shape == x.shape
        (out.square().sum() + 0 * x.sum()).backward()
        for step in range(8):
            augment.update(torch.rand(4), 4 * (step + 1))


# Pictures and errors


def test_augmented_bundled_pictures_are_pictures():
    reals = load_image_set(bundled("open-peeps-train"), size=32).batch(range(16))
    x = prepare(reals, seed=0, step=0, sample_indices=range(16), flip=False, dither=False)
    for name in NAMES:
        augment = make_augment(name, 3, 32)
        if name == "ada":
            augment.p.fill_(0.8)
        out = augment(x, augment.draw(0, 0, range(16), "real"))
        assert out.isfinite().all() and out.std() > 0.1 and out.abs().max() < 8
        assert make_grid(out).shape == (128, 128, 3)


def test_errors_name_the_flag_and_the_remedy():
    with pytest.raises(UsageError, match="--aug is 'difaug'; it must be one of diffaug, ada"):
        make_augment("difaug", 3, 32)
    with pytest.raises(UsageError, match="ada takes images of 1 or 3 channels, not 4"):
        make_augment("ada", 4, 32)
    with pytest.raises(UsageError, match="ada takes images of 2 pixels at least, not 1"):
        make_augment("ada", 3, 1)
    for wrong in ({"target": 1.5}, {"interval": 0}, {"images": 0}):
        with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
            make_augment("ada", 3, 8, **wrong)
    augment = make_augment("diffaug", 3, 8)
    draws = augment.draw(0, 0, range(4), "real")
    with pytest.raises(ValueError, match=r"made for images \[B, 3, 8, 8\], got \[4, 1, 8, 8\]"):
        augment(images(4, 1), draws)
    with pytest.raises(ValueError, match=r"takes draws \[4, 7\] for 4 images, got \[3, 7\]"):
        augment(images(4), draws[:3])
    with pytest.raises(ValueError, match="resume with the --aug of the run"):
        augment.load_state_dict(ada(0.1).state_dict())
    with pytest.raises(ValueError, match="resume with the --aug of the run"):
        ada(0.1).load_state_dict(augment.state_dict())
