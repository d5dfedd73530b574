"""Detection metrics. Host code.

`exact` has the metrics that are re-exported here, `bootstrap` their confidence intervals, and
`legacy` the variants of AUPRO in other papers.
"""

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
