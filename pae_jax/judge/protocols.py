"""Figures of other papers for the same maps: another size, and the variants of `metrics.legacy`.

The rows stand beside the official numbers, so that a difference to a printed number can be traced
to the way it was computed.
"""

from typing import Any

from data_pipelines.dataset import TestSplit
from pae_jax import metrics
from pae_jax.config import EvalConfig
from pae_jax.judge.maps import Maps
from pae_jax.metrics import legacy, measure

COLUMNS: tuple[str, ...] = ("protocol", "pixel_auroc", "pixel_ap", "pixel_aupro")

# The keys are the names of the functions, the values the words of the report.
LEGACY = {
    "aupro_linear_200": "200 linear thresholds, area below 0.3 rescaled",
    "aupro_dilated": "the same, predictions dilated by 5×5",
    "aupro_mean_of_images": "the same for each defective image alone, then the mean",
}


def compute(
    test: TestSplit,
    maps: Maps,
    reported: dict[str, Any],
    settings: EvalConfig,
    *,
    at_native: bool,
    network_shape: tuple[int, int],
) -> list[dict[str, Any]]:
    """Returns one row per protocol, the official one first; none without masks.

    Args:
      test: the test split.
      maps: the maps as they were read.
      reported: the official metrics.
      settings: the limit of AUPRO.
      at_native: whether the official metrics are those at the images' own sizes.
      network_shape: (h, w), the other size.

    Returns:
      Mappings with the keys `COLUMNS`; NaN for what a protocol does not define.
    """
    pairs = measure.map_mask_pairs(test, maps.values, native_size=at_native)
    if pairs is None:
        return []
    everything = range(len(test.names))
    sizes = {False: f"{network_shape[1]}×{network_shape[0]} pixels", True: "native size"}
    official = f"official, at {sizes[at_native]}"
    rows = [dict(zip(COLUMNS, (official, *(reported[name] for name in COLUMNS[1:])), strict=True))]
    if any(test.native_shape(i) != network_shape for i in everything):
        values = maps.values
        if at_native:
            values = [measure.resize_map(one, network_shape) for one in values]
        other = measure.map_mask_pairs(test, values, native_size=not at_native)
        assert other is not None  # there are masks
        pixels = metrics.pixel_metrics(other(everything), limit=settings.aupro_limit)
        masks = "masks by nearest neighbour" if at_native else "masks as they are"
        row = f"at {sizes[not at_native]}: maps resampled bilinearly, {masks}"
        found = row, pixels.auroc, pixels.average_precision, pixels.aupro
        rows.append(dict(zip(COLUMNS, found, strict=True)))
    labelled = list(pairs(everything))
    if labelled:
        of_maps, of_masks = zip(*labelled, strict=True)
        for name, meaning in LEGACY.items():
            value = getattr(legacy, name)(of_maps, of_masks)
            row = f"{name}: {meaning}", float("nan"), float("nan"), float(value)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows
