"""Is a trained f a projection onto ℳ? The properties of appendix A.2 and A.3, measured.

Every number is taken on normal images that f was not trained on and on corruptions of them.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from pae_jax import rng
from pae_jax.corruption import CorruptedBatch
from pae_jax.devices import hardware
from pae_jax.fixed_point import fixed_point
from pae_jax.projection import jacobian_identity

PerImage = dict[str, Float[Array, " b"]]

APPLICATIONS = 3  # of f, for which the contraction is followed

# Ratios are heavy-tailed: a faint corruption is soon smaller than the bias of f.
_MEDIANS = {f"contraction_{n}" for n in range(1, APPLICATIONS + 1)} | {"normal_dominance"}
# What uncorrupted images leave undefined. A NaN anywhere else is f's own, and stays visible.
_PARTIAL = _MEDIANS | {"error_outside_mask", "error_inside_mask", "corruption_suppression"}


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
    """What `errors` and `geometry` measure, over all images; host.

    Args:
      f: images → images. As `jax.tree_util.Partial(apply, params)` it is compiled once for all
        parameters; any other function is compiled for itself.
      clean: normal images from which tangents are estimated; not augmented.
      batches: one or several batches of corrupted images x̂, their sources x and masks.
      key: of the probes and the power iteration's start.
      neighbours, explained, power_steps, tolerance, max_steps: as in `geometry`.

    Returns:
      name → mean over the images where it is defined (contraction_n and normal_dominance: the
      median, since a faint corruption makes a ratio large); NaN where it is defined for none.
    """
    f = f if isinstance(f, jax.tree_util.Partial) else jax.tree_util.Partial(f)
    batches = [batches] if isinstance(batches, CorruptedBatch) else list(batches)
    run = functools.partial(
        _measure,
        neighbours=neighbours,
        explained=explained,
        power_steps=power_steps,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    found = [
        jax.device_get(run(f, clean, batch, jax.random.fold_in(key, i)))
        for i, batch in enumerate(batches)
    ]
    return summarise(found)


def summarise(found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Per-image values of several batches → one number a name, as `diagnose` returns; host."""
    together = {name: np.concatenate([values[name] for values in found]) for name in found[0]}
    return {name: _summary(name, values) for name, values in together.items()}


def errors(f: Callable, batch: CorruptedBatch) -> PerImage:
    """What a few applications of f tell, cheap enough during training.

    Returns (batch,) each, in the units of pixel values where nothing else is said:
      on_manifold_bias: root mean square of f(x) − x, the bias on ℳ of eq. 19.
      idempotency: of f(f(x̂)) − f(x̂), its residual.
      error_outside_mask: of f(x̂) − x outside the mask, weighted by 1−M: conservativity. NaN for M = 1.
      error_inside_mask: of f(x̂) − x inside the mask, weighted by M: what is left of the corruption.
        NaN for M = 0.
      contraction_n: ‖f⁽ⁿ⁾(x̂)−x‖ / ‖f⁽ⁿ⁻¹⁾(x̂)−x‖, the ρ of the n-th application, measured to the
        clean image and not to ℳ (eq. 8). NaN for an uncorrupted image, or once x is met.
    """
    corrupted, clean, mask = batch
    # A scan, so that f is compiled once for all its applications where loops cost nothing.
    _, images = jax.lax.scan(
        lambda x, _: (f(x),) * 2,
        corrupted,
        length=APPLICATIONS,
        unroll=hardware.loop_unroll(APPLICATIONS),
    )
    iterates = [corrupted, *images]
    distances = [_norm(iterate - clean) for iterate in iterates]
    channels = clean.shape[-1]

    def weighted(weights: Float[Array, "b h w 1"]) -> Float[Array, " b"]:
        total = jnp.sum(weights * (iterates[1] - clean) ** 2, axis=(1, 2, 3))
        return jnp.sqrt(_ratio(total, channels * jnp.sum(weights, axis=(1, 2, 3))))

    return {
        "on_manifold_bias": _rms(f(clean) - clean),
        "idempotency": _rms(iterates[2] - iterates[1]),
        "error_outside_mask": weighted(1 - mask),
        "error_inside_mask": weighted(mask),
        **{
            f"contraction_{n}": jnp.where(
                distances[0] > 0, _ratio(distances[n], distances[n - 1]), jnp.nan
            )
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
) -> PerImage:
    """Fixed points of f from x̂, the Jacobian at x, and the corruptions' directions.

    The tangent space at x is estimated by a local PCA about x: the leading principal directions
    of the differences to the `neighbours` nearest other images in `clean`. Where these lie far
    apart, or vary in more ways than there are neighbours, that is a rough estimate. A direction
    without any relation to ℳ has a normal_dominance of about √(k/(d−k)), with k ≤ neighbours
    directions kept, and d values in an image.

    Args:
      f: images → images.
      clean: normal images, not augmented; equals of x are left out.
      batch: x̂, x, M. The corruption's direction is δ ∝ x̂ − x = M⊙(y−x), eq. 13.
      key: of the probes and the power iteration's start.
      neighbours: of each x.
      explained: the share of the differences' squared length that the directions kept explain; the
        rest is curvature and noise.
      power_steps: products with J. The first half only turns the vector.
      tolerance, max_steps: of the fixed point, see `fixed_point`.

    Returns (batch,) each:
      fixed_point_steps: applications until the iteration from x̂ stopped.
      fixed_point_converged: 1 if it met the tolerance.
      fixed_point_error: root mean square of its value − x.
      jacobian_identity: ‖J_f(x̂) − I‖_F / √d, estimated by one probe.
      tangent_distortion: ‖(J_f(x) − I)t‖ for the unit vector t to the nearest normal image; 0 if f
        keeps what varies along ℳ.
      corruption_suppression: ‖(J_f(x) − I)δ‖ for the unit vector δ; 1 if f removes it, 0 if it lets it
        pass. NaN for an uncorrupted image.
      spectral_radius: of J_f(x); 1 for a projection. The geometric mean of the growth over the
        second half of the power iteration, which rotating (complex) eigenvalues do not upset.
      normal_dominance: ‖Π_T δ‖ / ‖Π_N δ‖, to stay below an η < 1 by eq. 14.
    """
    corrupted, x, _ = batch
    probe_key, start_key = jax.random.split(key)
    end = fixed_point(f, corrupted, tolerance=tolerance, max_steps=max_steps)
    differences = _to_neighbours(x, clean, neighbours)
    shift = corrupted - x
    _, push = jax.linearize(f, x)

    def defect(direction: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        unit, length = _unit(direction)
        return jnp.where(length > 0, _norm(push(unit) - unit), jnp.nan)

    return {
        "fixed_point_steps": end.steps.astype(x.dtype),
        "fixed_point_converged": end.converged.astype(x.dtype),
        "fixed_point_error": _rms(end.value - x),
        "jacobian_identity": jacobian_identity(f, corrupted, probe_key, normalize=True)[1],
        "tangent_distortion": defect(differences[:, 0]),
        "corruption_suppression": defect(shift),
        "spectral_radius": _spectral_radius(push, x, start_key, power_steps),
        "normal_dominance": _normal_dominance(shift, differences, explained),
    }


@functools.partial(
    jax.jit, static_argnames=("neighbours", "explained", "power_steps", "tolerance", "max_steps")
)
def _measure(
    f: Callable, clean: Array, batch: CorruptedBatch, key: Array, **options: Any
) -> PerImage:
    return {**errors(f, batch), **geometry(f, clean, batch, key, **options)}


def _to_neighbours(
    x: Float[Array, "b h w c"], clean: Float[Array, "n h w c"], count: int
) -> Float[Array, "b {count} h w c"]:
    """x′ − x for the nearest other normal images x′, nearest first; 0 where there are too few."""
    squared = jax.lax.map(lambda one: jnp.sum((x - one[None]) ** 2, axis=(1, 2, 3)), clean).T
    squared = jnp.where(squared > 0, squared, jnp.inf)
    padding = jnp.full((len(x), count), jnp.inf, x.dtype)
    nearest = jnp.argsort(jnp.concatenate([squared, padding], axis=1), axis=1)[:, :count]
    found = jnp.take_along_axis(jnp.concatenate([squared, padding], axis=1), nearest, axis=1)
    differences = clean[jnp.minimum(nearest, len(clean) - 1)] - x[:, None]
    return jnp.where(jnp.isfinite(found)[..., None, None, None], differences, 0)


def _spectral_radius(
    push: Callable, x: Float[Array, "b h w c"], key: Key[Array, ""], steps: int
) -> Float[Array, " b"]:
    keys = rng.example_keys(key, len(x))
    start = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)

    def step(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, growth = carry
        v, length = _unit(push(v))
        return v, growth + jnp.where(n >= steps // 2, jnp.log(length), 0)

    zero = jnp.zeros(len(x), x.dtype)
    _, growth = jax.lax.fori_loop(0, steps, step, (_unit(start)[0], zero))
    return jnp.exp(growth / (steps - steps // 2))


def _normal_dominance(
    shift: Float[Array, "b h w c"], differences: Float[Array, "b k h w c"], explained: float
) -> Float[Array, " b"]:
    def one(delta: Float[Array, " d"], span: Float[Array, "k d"]) -> Float[Array, ""]:
        # The principal directions are spanᵀu/√λ, with the eigenpairs (λ, u) of the Gram matrix.
        values, vectors = jnp.linalg.eigh(span @ span.T)
        larger = jnp.sum(values) - jnp.cumsum(values)  # than each value, in ascending order
        noise = jnp.finfo(delta.dtype).eps * len(span) * values[-1]
        kept = (larger < explained * jnp.sum(values)) & (values > noise)
        share = (vectors.T @ (span @ delta)) ** 2 / jnp.where(kept, values, jnp.inf)
        tangent, total = jnp.sum(share), jnp.sum(delta**2)
        ratio = jnp.sqrt(tangent / jnp.maximum(total - tangent, jnp.finfo(delta.dtype).tiny))
        return jnp.where(total > 0, ratio, jnp.nan)

    flat = differences.reshape(*differences.shape[:2], -1)
    return jax.vmap(one)(shift.reshape(len(shift), -1), flat)


def _norm(x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3)))


def _rms(x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.mean(x**2, axis=(1, 2, 3)))


def _unit(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """x / ‖x‖, 0 where that is 0, and ‖x‖."""
    length = _norm(x)
    scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    return x * scale[:, None, None, None], length


def _ratio(numerator: Float[Array, " b"], denominator: Float[Array, " b"]) -> Float[Array, " b"]:
    """NaN where the denominator is 0."""
    defined = denominator > 0
    return jnp.where(defined, numerator / jnp.where(defined, denominator, 1), jnp.nan)


def _summary(name: str, values: np.ndarray) -> float:
    values = values[~np.isnan(values)] if name in _PARTIAL else values
    if not len(values):
        return float("nan")
    return float(np.median(values) if name in _MEDIANS else np.mean(values))
