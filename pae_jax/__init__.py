"""pae_jax: projecting autoencoders for structural anomaly detection, in JAX and Flax.

After "Rethinking Structural Anomaly Detection: From Decision Boundaries to Projection
Operators" (arXiv 2606.15280). A U-Net f learns from normal images alone to undo synthetic
corruptions. It becomes a projection onto the manifold of normal images, and whatever it changes
in a test image is anomalous.

Where things are
----------------

The method, one module per concept of the paper:

    corruption      x̂ = M⊙y + (1−M)⊙x, eq. 13: the kinds of corruption
    masks           the masks M: shapes, opacity, placement
    augmentation    flips, rotations and other policies (§4)
    image_ops       conversion, cropping, resampling, blocks of pixels, padding
    objective       the loss, eq. 1, and the weighted penalties of appendix A.3
    projection      A.3: the Jacobian-identity and idempotency penalties
    fixed_point     Theorem 2: the iteration x⁽ⁿ⁺¹⁾ = f(x⁽ⁿ⁾), by lax.while_loop
    unet            the network, with a dilated bottleneck
    anomaly_map     Δ(x̂, f(x̂)): SSIM and other maps, smoothing, image scores (§2.2)
    detection       from images to reconstructions, maps, scores and decision thresholds
    diagnostics     A.2 and A.3 measured: is a trained f a projection?
    known_manifolds planes and spheres, on which the theorems have closed forms

Training, and the verbs of the command line:

    train           the loop          train_step   one step, its state and optimizer
    population      many runs as one compiled program
    evaluate        metrics and report of a run          predict   new images
    sweep           an ablation and its table            aot       programs of a TPU slice
    main            the command `pae`

Settings:

    config          the frozen dataclasses and their limits
    config_file     config files, overrides, shipped configs
    config_schema   the check of types and limits, old names of keys
    rng             named random streams

Packages:

    inference/      a trained model in use: `pae_jax.load(workdir)` returns it
    methods/        one file per method: the paper's, RIAD (inpainting), segmentation, Deep SVDD, …
    comparison/     several runs on the same test images, with paired intervals
    foreground/     a network that finds the object, so that the background is suppressed (§4)
    judge/          anomaly maps of other tools through our metrics and report
    metrics/        exact AUROC, AP, AUPRO, AUPIMO and F1; bootstrap; legacy variants
    workdir/        a run on disk: atomic writing (files), checkpoints, records, logs, validation
    devices/        sharding of the step over devices, batches, chips, Winograd, process start-up
    deployment/     exported programs (StableHLO, ONNX), packed models, the model card
    report/         report.html and comparison.html, their charts and pictures
    configs/        the shipped config files: `from pae_jax.configs import folder`

A module is imported when it is first used: `import pae_jax` alone is quick, and
`pae_jax.objective.reconstruction_loss` works.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pae_jax.inference.model import load as load

__version__ = "0.2.0"

_MODULES = (
    "anomaly_map",
    "aot",
    "augmentation",
    "comparison",
    "config",
    "config_file",
    "config_schema",
    "configs",
    "corruption",
    "deployment",
    "detection",
    "devices",
    "diagnostics",
    "evaluate",
    "fixed_point",
    "foreground",
    "image_ops",
    "inference",
    "judge",
    "known_manifolds",
    "main",
    "masks",
    "methods",
    "metrics",
    "objective",
    "population",
    "predict",
    "projection",
    "report",
    "rng",
    "sweep",
    "train",
    "train_step",
    "unet",
    "workdir",
)


def __getattr__(name: str) -> Any:
    """Imports a module of the package, or `load`, when it is first used."""
    if name == "load":
        return importlib.import_module(f"{__name__}.inference.model").load
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the names of the modules, loaded or not, and of `load`."""
    return sorted({*globals(), *_MODULES, "load"})
