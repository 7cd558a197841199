"""The evaluation protocol of the AdaFM authors' released code (Zhao, Cong and Carin, ICML 2020), under its own names.

Its values compare with the authors' tables and with no other Frechet distance: the network is torchvision's ImageNet
classifier, the colours are moved as for an image in [0, 1] although they are in [-1, 1], images are not rounded to 8
bits, and the real ones pass through the flips and the noise of training and are drawn with repetition.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from adafm_trainer import keyed
from adafm_trainer.data.prepare import prepare
from adafm_trainer.errors import UsageError
from adafm_trainer.metrics.extractors import weights_digest
from adafm_trainer.metrics.frechet import frechet_distance
from adafm_trainer.metrics.inception import DIMS, SIZE, load_inception
from adafm_trainer.metrics.inception_score import SPLITS, inception_score
from adafm_trainer.metrics.value import MetricValue

NAME = "inception-torchvision"
BATCH = 16
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PROTOCOL = "fid_authors: 299 px bilinear without antialias, x (std/0.5) + (mean-0.5)/0.5, 2048 pooled features"


class AuthorsProtocol:
    """``fid_authors`` and ``is_authors`` with torchvision's Inception weights from a local file.

    Raises UsageError where the file is missing or holds another network or no classifier.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self._network = load_inception(Path(path), "torchvision")
        if self._network.class_weights is None or self._network.class_bias is None:
            raise UsageError(f"{path} holds no classifier (fc.weight and fc.bias), which the Inception score needs")
        self.hash = weights_digest(_PROTOCOL, self._network)
        self._network.to(device)
        self._device = device

    def evaluate(self, fake: torch.Tensor, real: torch.Tensor) -> dict[str, MetricValue]:
        """``fid_authors`` of generated against real images, ``is_authors`` and its deviation of the generated ones.

        Both sets float ``[N, 1 or 3, H, W]`` in [-1, 1], the real ones as ``draw_reals`` makes them. Each is cut to a
        multiple of 16. The distance is exact (``frechet_distance``) where the authors iterate a root of the product.
        Raises ValueError for a set of fewer than 16 images.
        """
        n, m = (len(x) // BATCH * BATCH for x in (fake, real))
        if min(n, m) == 0:
            raise ValueError(
                f"fid_authors takes batches of {BATCH} images, got {len(fake)} generated, {len(real)} real"
            )
        moved, plain = self._features(fake[:n], True), self._features(fake[:n], False)
        distance = frechet_distance(moved, self._features(real[:m], True))
        logits = plain @ self._network.class_weights.T + self._network.class_bias
        score = inception_score(torch.softmax(logits, dim=1), min(SPLITS, n))
        tags = {"n_fake": n, "n_real": m, "extractor": NAME, "extractor_hash": self.hash}
        note = "the authors' protocol: ImageNet classifier, training transform on the real images"
        split = f"{score.splits} splits"
        return {
            "fid_authors": MetricValue(distance, note=note, **tags),
            "is_authors": MetricValue(score.mean, note=split, **tags),
            "is_std_authors": MetricValue(score.std, note=split, **tags),
        }

    @torch.no_grad()
    def _features(self, images: torch.Tensor, moved: bool) -> torch.Tensor:
        features = torch.empty(len(images), DIMS, dtype=torch.float64)
        mean, std = (torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (_MEAN, _STD))
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH].to(self._device, torch.float32).expand(-1, 3, -1, -1)
            part = F.interpolate(part, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
            part = part * (std / 0.5) + (mean - 0.5) / 0.5 if moved else part
            with torch.autocast(part.device.type, enabled=False):
                features[start : start + len(part)] = self._network.of_scaled(part).to("cpu", torch.float64)
        return features


def draw_reals(pixels: torch.Tensor, count: int, seed: int, flip: bool) -> torch.Tensor:
    """Real images as the authors draw them: batches of 16 of one shuffling each, so that images repeat between batches.

    uint8 ``[N, C, H, W]`` -> float32 ``[count // 16 * 16, C, H, W]``, flipped at random where ``flip`` says so and with
    noise U[0, 1) / 128; a function of ``seed``. A set of fewer than 16 images gives batches of all of them; the
    number of images then stays just below the count.
    """
    size = min(BATCH, len(pixels))
    drawn = []
    for batch in range(count // BATCH * BATCH // size):
        rows = torch.from_numpy(keyed.permutation(seed, "authors/real", batch, len(pixels))[:size])
        images = prepare(pixels[rows], seed=seed, step=batch, sample_indices=range(size), flip=flip, dither=True)
        drawn.append(images)
    return torch.cat(drawn) if drawn else torch.empty(0, *pixels.shape[1:])
