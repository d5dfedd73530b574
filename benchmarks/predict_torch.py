"""The detection of pae_jax in PyTorch, for benchmarks/predict.py only.

    python benchmarks/predict_torch.py DETECTOR PICTURE OUT

judges one picture in a new process, as `pae predict` does, and writes its score, heat map and mask:
the time until then is that of PyTorch's first picture. DETECTOR is a file of `save`.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from PIL import Image
from step_torch import LAYOUTS, UNet, load
from torch import nn  # pyright: ignore[reportMissingImports]

C1, C2 = 0.01**2, 0.03**2  # of SSIM


class Filters(NamedTuple):
    """Matrices (h, h) and (w, w) that filter both axes: SSIM's window and the smoothing."""

    window: tuple[torch.Tensor, torch.Tensor]
    smoothing: tuple[torch.Tensor, torch.Tensor]


class Detector(nn.Module):
    """The counterpart of pae_jax.detection.detect with the defaults of the section eval.

    Moments are E[x²] − E[x]² by matrix products. It is the fastest form, with errors of 1e-4.
    """

    def __init__(self, network: UNet, filters: Filters, layout: str):
        super().__init__()
        self.network, self.layout, self.filters = network, layout, filters

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns maps (b, h, w) and image scores of uint8 images (b, h, w, 1 or 3)."""
        x = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float() / 255
        x = x.contiguous(memory_format=LAYOUTS[self.layout])
        y = self.network(x)
        maps = self._dissimilarity(x, y).mean(1).clamp(0, 1)
        maps = _filter(maps, self.filters.smoothing)
        pixels = maps.flatten(1)
        largest = pixels.topk(max(1, round(0.01 * pixels.shape[1])), sorted=False).values
        scores = {"sum": pixels.sum(1), "max": pixels.amax(1), "topk": largest.mean(1)}
        return maps, scores

    def _dissimilarity(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        stacked = torch.cat([x, y, x - y])
        moments = _filter(torch.cat([stacked, stacked**2]), self.filters.window)
        mean, square = moments.chunk(2)
        (mean_x, mean_y, mean_d), variances = mean.chunk(3), (square - mean**2).chunk(3)
        luminance = mean_d**2 / (mean_x**2 + mean_y**2 + C1)
        structure = variances[2] / (variances[0] + variances[1] + C2)
        return luminance + structure - luminance * structure


def _filter(maps: torch.Tensor, matrices: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    rows, columns = matrices
    return rows @ maps @ columns.T


def make_detector(config: Any, variables: Any, layout: str) -> Detector:
    """Returns the detector with the parameters of a Flax tree.

    Args:
      config: a run's configuration, with defaults in the section eval.
      variables: the parameters of the network.
      layout: the memory layout of images and kernels, a key of `LAYOUTS`.
    """
    from pae_jax import anomaly_map, image_ops

    shape, settings = config.data.shape, config.eval
    window = image_ops.gaussian_kernel(anomaly_map.SSIM_SIGMA, anomaly_map.SSIM_RADIUS)
    width = settings.smoothing_fraction * min(shape)
    smoothing = anomaly_map.SMOOTHINGS[settings.smoothing](max(1.0, width))

    def matrices(kernel: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = (torch.tensor(image_ops.filter_matrix(kernel, n)).float() for n in shape)
        return rows, columns

    network = UNet(config.model)
    load(network, variables)
    network = network.to(memory_format=LAYOUTS[layout])  # pyright: ignore
    return Detector(network, Filters(matrices(window), matrices(smoothing)), layout).eval()


def save(detector: Detector, path: Path, shape: tuple[int, int], thresholds: Any) -> None:
    """Writes the detector with the size of its images and its thresholds."""
    # Under the name by which the new process imports this module.
    values = {"shape": shape, "score": thresholds.score, "pixel": thresholds.pixel}
    torch.save({"detector": detector, **values}, path)


def first_picture(saved: Path, picture: Path, out: Path) -> None:
    """Judges one picture and writes the results."""
    model = torch.load(saved, weights_only=False)
    height, width = model["shape"]
    original = Image.open(picture).convert("RGB")
    small = original.resize((width, height), Image.Resampling.BILINEAR)
    with torch.inference_mode():
        maps, scores = model["detector"](torch.tensor(np.asarray(small))[None])
    values = np.asarray(Image.fromarray(maps[0].numpy()).resize(original.size))
    heat = np.asarray(original, np.float32) / 2
    heat[..., 0] += 127 * np.clip(values / (2 * model["pixel"]), 0, 1)
    out.mkdir()
    Image.fromarray(heat.astype(np.uint8)).save(out / "heatmap.png")
    Image.fromarray((255 * (values > model["pixel"])).astype(np.uint8)).save(out / "mask.png")
    score = float(scores["sum"])
    (out / "scores.csv").write_text(f"{picture.name},{score},{int(score > model['score'])}\n")


if __name__ == "__main__":
    import predict_torch

    predict_torch.first_picture(*map(Path, sys.argv[1:4]))
