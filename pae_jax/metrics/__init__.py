"""Exact detection metrics, their bootstrap intervals, and the legacy variants of other papers."""

from pae_jax.metrics.exact import (
    aupimo,
    aupro,
    auroc,
    average_precision,
    f1_max,
    image_metrics,
    pixel_metrics,
)

__all__ = [
    "aupimo",
    "aupro",
    "auroc",
    "average_precision",
    "f1_max",
    "image_metrics",
    "pixel_metrics",
]
