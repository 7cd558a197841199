"""Inception-v3 in the two variants that Frechet distances are published with; the weights come from a local file.

The network is that of Szegedy et al., "Rethinking the Inception architecture" (CVPR 2016). Variant ``fid`` is the
TensorFlow release of 2015-12-05: 1008 classes, average pooling that leaves padding out of the mean, and maximum pooling
in the very last block. Variant ``torchvision`` is the ImageNet classifier of that library: 1000 classes, padding counts
in the mean, and the last block averages too. Module names are the same in both, those of the common PyTorch ports, so
that ``pt_inception-2015-12-05-*.pth`` and ``inception_v3_google-*.pth`` load by name.
"""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from adafm_trainer.errors import UsageError

DIMS = 2048
SIZE = 299
_CLASSES = {"fid": 1008, "torchvision": 1000}
_FILES = {"fid": "pt_inception-2015-12-05-6726825d.pth", "torchvision": "inception_v3_google-0cc3c7bd.pth"}


class _Conv(nn.Module):
    """Convolution without bias, batch normalisation (epsilon 1e-3), ReLU. Odd filters of stride 1 keep the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if stride == 1 and same else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _mean(variant: str) -> partial[torch.Tensor]:
    return partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=variant == "torchvision")


def _max3(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halved(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2)


class _BlockA(nn.Module):
    def __init__(self, variant: str, inputs: int, pooled: int) -> None:
        super().__init__()
        self._pool = _mean(variant)
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(inputs, 48, 1), _Conv(48, 64, 5)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = _Conv(64, 96, 3), _Conv(96, 96, 3)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(self._pool(x))], dim=1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = _Conv(64, 96, 3), _Conv(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halved(x)], dim=1)


class _BlockC(nn.Module):
    def __init__(self, variant: str, inputs: int, width: int) -> None:
        super().__init__()
        self._pool = _mean(variant)
        row, column = (1, 7), (7, 1)
        self.branch1x1 = _Conv(inputs, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = _Conv(inputs, width, 1), _Conv(width, width, row)
        self.branch7x7_3 = _Conv(width, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(inputs, width, 1), _Conv(width, width, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(width, width, row), _Conv(width, width, column)
        self.branch7x7dbl_5 = _Conv(width, 192, row)
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(self._pool(x))], dim=1)


class _BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(inputs, 192, 1), _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(inputs, 192, 1), _Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, (7, 1)), _Conv(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, _halved(x)], dim=1)


class _BlockE(nn.Module):
    def __init__(self, variant: str, inputs: int, last: bool) -> None:
        super().__init__()
        self._pool = _max3 if last and variant == "fid" else _mean(variant)
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 448, 1), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self._pool(x))]
        return torch.cat(parts, dim=1)


class InceptionFeatures(nn.Module):
    """Pixels ``[N, 3, 299, 299]`` in 0..255 -> the 2048 pooled features ``[N, 2048]``.

    ``class_weights`` float64 ``[classes, 2048]`` and ``class_bias`` ``[classes]`` are those of the classifier after the
    features, None where the weights came without it; they are no parameters of this network.
    """

    def __init__(self, variant: str = "fid") -> None:
        super().__init__()
        self.class_weights: torch.Tensor | None = None
        self.class_bias: torch.Tensor | None = None
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c = _BlockA(variant, 192, 32), _BlockA(variant, 256, 64)
        self.Mixed_5d = _BlockA(variant, 288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b, self.Mixed_6c = _BlockC(variant, 768, 128), _BlockC(variant, 768, 160)
        self.Mixed_6d, self.Mixed_6e = _BlockC(variant, 768, 160), _BlockC(variant, 768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b, self.Mixed_7c = _BlockE(variant, 1280, last=False), _BlockE(variant, 2048, last=True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.of_scaled(pixels / 127.5 - 1.0)

    def of_scaled(self, images: torch.Tensor) -> torch.Tensor:
        """The features of images ``[N, 3, 299, 299]`` that are scaled already, for ``fid`` to [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halved(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))


def load_inception(path: Path, variant: str = "fid") -> InceptionFeatures:
    """The network of a variant, in evaluation mode, with weights from ``path``: a PyTorch state dictionary or a
    safetensors file.

    Raises UsageError where the file is not there, is not a plain dictionary of tensors, or holds another network: the
    file of one variant is refused for the other by its number of classes.
    """
    weights = _read(path, _FILES[variant])
    classifier, classes = weights.get("fc.weight"), _CLASSES[variant]
    if classifier is not None and tuple(classifier.shape) != (classes, DIMS):
        raise UsageError(
            f"{path} is an Inception network of {len(classifier)} classes; the {variant} network has {classes}: "
            f"values from other weights are not comparable. Give {_FILES[variant]}"
        )
    # Building the network draws weights that are replaced; the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        network = InceptionFeatures(variant)
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    wrong = [k for k, v in expected.items() if k not in weights or weights[k].shape != v.shape]
    if wrong:
        raise UsageError(
            f"{path} is not the {variant} Inception network: {len(wrong)} of {len(expected)} tensors are missing or of "
            f"another shape, the first is {wrong[0]!r}. Give {_FILES[variant]}"
        )
    network.load_state_dict({k: weights[k] for k in expected}, strict=False)
    if classifier is not None:
        network.class_weights = classifier.double()
        network.class_bias = weights["fc.bias"].double() if "fc.bias" in weights else None
    return network.requires_grad_(False).eval()


def _read(path: Path, usual: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UsageError(f"no Inception weights are at {path}: give the path of {usual}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} cannot be read as a dictionary of tensors: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UsageError(f"{path} does not hold a plain dictionary of tensors but a {type(weights).__name__}")
    return weights
