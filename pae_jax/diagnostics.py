"""Diagnostics: how close a trained f is to a projection onto ℳ (appendix A.2 and A.3).

Every quantity is measured on normal images that f was not trained on and on corruptions of them.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Key

from pae_jax import rng
from pae_jax.corruption import CorruptedBatch
from pae_jax.devices import hardware
from pae_jax.fixed_point import fixed_point
from pae_jax.projection import jacobian_identity

APPLICATIONS = 3  # the number of applications of f whose contraction is measured


class Diagnostic(struct.PyTreeNode):
    """A quantity measured on every image of a batch, and how it is summarised.

    Attributes:
      value: (b,) one value per image.
      reduce: "mean" or "median" over the images. Ratios take the median, because they are
        heavy-tailed: a faint corruption is soon smaller than the bias of f.
      skip_nan: True if NaN marks images for which the quantity is undefined, such as uncorrupted
        ones; these are left out. Otherwise a NaN comes from f, and the summary is NaN too.
    """

    value: Any
    reduce: str = struct.field(pytree_node=False, default="mean")
    skip_nan: bool = struct.field(pytree_node=False, default=False)


Diagnostics = dict[str, Diagnostic]


def diagnose(
    f: Callable,
    clean: Float[Array, "n h w c"],
    batches: CorruptedBatch | Iterable[CorruptedBatch],
    key: Key[Array, ""],
    *,
    neighbours: int = 8,
    explained: float = 0.95,
    power_steps: int = 20,
    tolerance: float = 1e-3,
    max_steps: int = 50,
) -> dict[str, float]:
    """Returns the diagnostics of `errors` and `geometry`, summarised over all images.

    Runs on the host; the measurement itself is jitted.

    Args:
      f: images → images. As `jax.tree_util.Partial(apply, params)` it is compiled once for all
        parameters; any other function is compiled separately.
      clean: normal images from which tangents are estimated; not augmented.
      batches: one or several batches of corrupted images x̂, their sources x and masks.
      key: for the probes and the start of the power iteration.
      neighbours: see `geometry`.
      explained: see `geometry`.
      power_steps: see `geometry`.
      tolerance: see `geometry`.
      max_steps: see `geometry`.

    Returns:
      name → the mean or median, as `Diagnostic.reduce` says, over the images for which the
      quantity is defined; NaN if there are none.
    """
    f = f if isinstance(f, jax.tree_util.Partial) else jax.tree_util.Partial(f)
    batches = [batches] if isinstance(batches, CorruptedBatch) else batches
    run = functools.partial(
        _measure,
        neighbours=neighbours,
        explained=explained,
        power_steps=power_steps,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    measured = [
        jax.device_get(run(f, clean, batch, jax.random.fold_in(key, i)))
        for i, batch in enumerate(batches)
    ]
    return summarise(measured)


def summarise(batches: Sequence[Mapping[str, Diagnostic]]) -> dict[str, float]:
    """Returns one number per name from the diagnostics of one or several batches.

    Args:
      batches: numpy arrays, with the same names in every batch.

    Returns:
      The numbers, as `diagnose` returns them.
    """
    return {name: _summary([batch[name] for batch in batches]) for name in batches[0]}


def errors(f: Callable, batch: CorruptedBatch) -> Diagnostics:
    """Measures the errors of a few applications of f; cheap enough to run during training.

    All but the contraction are root mean squares, in the units of pixel values:

    - on_manifold_bias: f(x) − x, the bias on ℳ of eq. 19.
    - idempotency: f(f(x̂)) − f(x̂), the idempotency residual.
    - error_outside_mask: f(x̂) − x outside the mask, weighted by 1−M: conservativity. NaN for M = 1.
    - error_inside_mask: f(x̂) − x inside the mask, weighted by M: the remaining corruption. NaN for
      M = 0.
    - contraction_n: ‖f⁽ⁿ⁾(x̂)−x‖ / ‖f⁽ⁿ⁻¹⁾(x̂)−x‖, the ρ of the n-th application, measured to the
      clean image and not to ℳ (eq. 8). NaN for an uncorrupted image, or once x is reached.

    Args:
      f: images → images.
      batch: x̂, x, M.

    Returns:
      The diagnostics by name.
    """
    corrupted, clean, mask = batch
    # A scan compiles f once for all applications, on platforms where a loop costs no speed.
    _, images = jax.lax.scan(
        lambda x, _: (f(x),) * 2,
        corrupted,
        length=APPLICATIONS,
        unroll=hardware.loop_unroll(APPLICATIONS),
    )
    iterates = [corrupted, *images]
    distances = [_norm(iterate - clean) for iterate in iterates]
    channels = clean.shape[-1]

    def weighted_error(weights: Float[Array, "b h w 1"]) -> Float[Array, " b"]:
        total = jnp.sum(weights * (iterates[1] - clean) ** 2, axis=(1, 2, 3))
        return jnp.sqrt(_ratio(total, channels * jnp.sum(weights, axis=(1, 2, 3))))

    def contraction(n: int) -> Float[Array, " b"]:
        return jnp.where(distances[0] > 0, _ratio(distances[n], distances[n - 1]), jnp.nan)

    return {
        "on_manifold_bias": Diagnostic(_rms(f(clean) - clean)),
        "idempotency": Diagnostic(_rms(iterates[2] - iterates[1])),
        "error_outside_mask": Diagnostic(weighted_error(1 - mask), skip_nan=True),
        "error_inside_mask": Diagnostic(weighted_error(mask), skip_nan=True),
        **{
            f"contraction_{n}": Diagnostic(contraction(n), reduce="median", skip_nan=True)
            for n in range(1, APPLICATIONS + 1)
        },
    }


def geometry(
    f: Callable,
    clean: Float[Array, "n h w c"],
    batch: CorruptedBatch,
    key: Key[Array, ""],
    *,
    neighbours: int = 8,
    explained: float = 0.95,
    power_steps: int = 20,
    tolerance: float = 1e-3,
    max_steps: int = 50,
) -> Diagnostics:
    """Measures the fixed points of f, its Jacobian at x, and the directions of the corruptions.

    - fixed_point_steps: the number of applications until the iteration from x̂ stopped.
    - fixed_point_converged: 1 if the iteration met the tolerance.
    - fixed_point_error: root mean square of the final value − x.
    - jacobian_identity: ‖J_f(x̂) − I‖_F / √d, estimated by one probe.
    - tangent_distortion: ‖(J_f(x) − I)t‖ for the unit vector t to the nearest normal image; 0 if f
      keeps variation along ℳ.
    - corruption_suppression: ‖(J_f(x) − I)δ‖ for the unit vector δ; 1 if f removes the corruption,
      0 if f keeps it. NaN for an uncorrupted image.
    - spectral_radius: the spectral radius of J_f(x), 1 for a projection. It is the geometric mean
      of the growth over the second half of a power iteration, which is also correct for
      complex eigenvalues, under which the vector rotates.
    - normal_dominance: ‖Π_T δ‖ / ‖Π_N δ‖, at most an η < 1 by eq. 14.

    The tangent space at x is estimated by a local PCA about x: the leading principal directions
    of the differences to the `neighbours` nearest other images in `clean`. The estimate is rough
    if these images are far apart, or if ℳ has more dimensions than there are neighbours. A
    direction unrelated to ℳ has a normal_dominance of about √(k/(d−k)), with k ≤ neighbours
    principal directions, and d values in an image.

    Args:
      f: images → images.
      clean: normal images, not augmented; images equal to x are left out.
      batch: x̂, x, M. The direction of the corruption is δ ∝ x̂ − x = M⊙(y−x), eq. 13.
      key: for the probes and the start of the power iteration.
      neighbours: the number of nearest images for each x.
      explained: the fraction of the squared length of the differences that the principal
        directions explain; the rest is regarded as curvature and noise.
      power_steps: products with J. The first half only aligns the vector.
      tolerance: see `fixed_point`.
      max_steps: see `fixed_point`.

    Returns:
      The diagnostics by name.
    """
    corrupted, x, _ = batch
    probe_key, start_key = jax.random.split(key)
    end = fixed_point(f, corrupted, tolerance=tolerance, max_steps=max_steps)
    differences = _to_neighbours(x, clean, neighbours)
    shift = corrupted - x
    _, jvp = jax.linearize(f, x)

    def change(direction: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        """Returns ‖(J_f(x) − I)v‖ for the unit vector v along the direction."""
        unit, length = _unit(direction)
        return jnp.where(length > 0, _norm(jvp(unit) - unit), jnp.nan)

    _, jacobian_norm = jacobian_identity(f, corrupted, probe_key, normalize=True)
    dominance = _normal_dominance(shift, differences, explained)
    return {
        "fixed_point_steps": Diagnostic(end.steps.astype(x.dtype)),
        "fixed_point_converged": Diagnostic(end.converged.astype(x.dtype)),
        "fixed_point_error": Diagnostic(_rms(end.value - x)),
        "jacobian_identity": Diagnostic(jacobian_norm),
        "tangent_distortion": Diagnostic(change(differences[:, 0])),
        "corruption_suppression": Diagnostic(change(shift), skip_nan=True),
        "spectral_radius": Diagnostic(_spectral_radius(jvp, x, start_key, power_steps)),
        "normal_dominance": Diagnostic(dominance, reduce="median", skip_nan=True),
    }


@functools.partial(
    jax.jit, static_argnames=("neighbours", "explained", "power_steps", "tolerance", "max_steps")
)
def _measure(
    f: Callable, clean: Array, batch: CorruptedBatch, key: Array, **options: Any
) -> Diagnostics:
    return {**errors(f, batch), **geometry(f, clean, batch, key, **options)}


def _to_neighbours(
    x: Float[Array, "b h w c"], clean: Float[Array, "n h w c"], count: int
) -> Float[Array, "b {count} h w c"]:
    """Returns x′ − x for the nearest other normal images x′, nearest first.

    Rows are 0 if there are fewer than `count` other images.
    """
    # A loop over the images, because all differences at once would fill the memory.
    squared = jax.lax.map(lambda image: jnp.sum((x - image[None]) ** 2, axis=(1, 2, 3)), clean).T
    squared = jnp.where(squared > 0, squared, jnp.inf)  # x itself is no neighbour
    padding = jnp.full((len(x), count), jnp.inf, x.dtype)
    padded = jnp.concatenate([squared, padding], axis=1)
    nearest = jnp.argsort(padded, axis=1)[:, :count]
    exists = jnp.isfinite(jnp.take_along_axis(padded, nearest, axis=1))
    differences = clean[jnp.minimum(nearest, len(clean) - 1)] - x[:, None]
    return jnp.where(exists[..., None, None, None], differences, 0)


def _spectral_radius(
    jvp: Callable, x: Float[Array, "b h w c"], key: Key[Array, ""], steps: int
) -> Float[Array, " b"]:
    keys = rng.example_keys(key, len(x))
    start = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)

    def step(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, growth = carry
        v, length = _unit(jvp(v))
        return v, growth + jnp.where(n >= steps // 2, jnp.log(length), 0)

    zero = jnp.zeros(len(x), x.dtype)
    _, growth = jax.lax.fori_loop(0, steps, step, (_unit(start)[0], zero))
    return jnp.exp(growth / (steps - steps // 2))


def _normal_dominance(
    shift: Float[Array, "b h w c"], differences: Float[Array, "b k h w c"], explained: float
) -> Float[Array, " b"]:
    def dominance(delta: Float[Array, " d"], span: Float[Array, "k d"]) -> Float[Array, ""]:
        # The principal directions are spanᵀu/√λ, with the eigenpairs (λ, u) of the Gram matrix,
        # which is small: k × k instead of d × d.
        # In full precision on every platform, because small eigenvalues decide what is kept.
        gram = jnp.matmul(span, span.T, precision=jax.lax.Precision.HIGHEST)
        values, vectors = jnp.linalg.eigh(gram)
        # The eigenvalues ascend. A direction is kept if the larger ones explain too little.
        sum_of_larger = jnp.sum(values) - jnp.cumsum(values)
        rounding = jnp.finfo(delta.dtype).eps * len(span) * values[-1]
        kept = (sum_of_larger < explained * jnp.sum(values)) & (values > rounding)
        components = (vectors.T @ (span @ delta)) ** 2 / jnp.where(kept, values, jnp.inf)
        tangent, total = jnp.sum(components), jnp.sum(delta**2)
        ratio = jnp.sqrt(tangent / jnp.maximum(total - tangent, jnp.finfo(delta.dtype).tiny))
        return jnp.where(total > 0, ratio, jnp.nan)

    flat = differences.reshape(*differences.shape[:2], -1)
    return jax.vmap(dominance)(shift.reshape(len(shift), -1), flat)


def _norm(x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3)))


def _rms(x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.mean(x**2, axis=(1, 2, 3)))


def _unit(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """Returns x / ‖x‖, or 0 if x is 0, and ‖x‖."""
    length = _norm(x)
    scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    return x * scale[:, None, None, None], length


def _ratio(numerator: Float[Array, " b"], denominator: Float[Array, " b"]) -> Float[Array, " b"]:
    """Returns the ratio; NaN where the denominator is 0."""
    defined = denominator > 0
    return jnp.where(defined, numerator / jnp.where(defined, denominator, 1), jnp.nan)


def _summary(parts: Sequence[Diagnostic]) -> float:
    values = np.concatenate([part.value for part in parts])
    if parts[0].skip_nan:
        values = values[~np.isnan(values)]
    if not len(values):
        return float("nan")
    return float(np.median(values) if parts[0].reduce == "median" else np.mean(values))
