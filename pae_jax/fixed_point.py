"""Fixed points of f by iteration (§3.2, appendix A.2, Theorem 2), for each image independently.

There is no gradient, because `jax.lax.while_loop` cannot be differentiated in reverse mode.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class FixedPoint(NamedTuple):
    """The result of the iteration, per image.

    Attributes:
      value: x⁽ⁿ⁾, n = steps.
      steps: the number of applications of f that led to `value`, at most max_steps.
      residual: ‖f(x⁽ⁿ⁻¹⁾) − x⁽ⁿ⁻¹⁾‖₂, the last residual that was computed.
      converged: True if the residual met the tolerance.
      trace: the residual at every step; after an image has stopped, its last residual.
      distance: ‖value − the plain iteration's value‖₂; 0 for the plain solver. Fixed points of a
        projection are not isolated, so an accelerated solver may end at another one than fⁿ(x̂).
    """

    value: Float[Array, "b *image"]
    steps: Int[Array, " b"]
    residual: Float[Array, " b"]
    converged: Bool[Array, " b"]
    trace: Float[Array, "b steps"]
    distance: Float[Array, " b"]


def fixed_point(
    f: Callable,
    x: Float[Array, "b *image"],
    *,
    tolerance: float = 1e-3,
    max_steps: int = 50,
    solver: str = "picard",
    absolute: float = 0.0,
    damping: float = 0.5,
    memory: int = 5,
) -> FixedPoint:
    """Iterates f from x until every image has converged, for at most max_steps steps.

    An image stops as soon as ‖f(x⁽ⁿ⁾) − x⁽ⁿ⁾‖₂ ≤ absolute + tolerance·‖x⁽ⁿ⁾‖₂ and is then frozen,
    so its result does not depend on the other images of the batch. An image whose residual is
    not finite also stops, with its present value and not converged.

    Args:
      f: images → images, each image of a batch independent of the others.
      x: (batch, …) starting points.
      tolerance: relative to the norm of the iterate.
      max_steps: the largest number of applications of f, at least 1.
      solver: "picard" is the plain iteration x⁽ⁿ⁺¹⁾ = f(x⁽ⁿ⁾) of Theorem 2. "damped" takes the
        step (1−damping)·x + damping·f(x). "anderson" is Anderson acceleration (type II) over the
        last `memory` steps. The last two also run the plain iteration, to report `distance`.
      absolute: added to the relative tolerance; in the units of x.
      damping: the weight of f(x) in a damped step, in (0, 1].
      memory: the number of differences that Anderson acceleration keeps, each of the size of x.

    Returns:
      The fixed points; arrays of the batch.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps: at least 1, not {max_steps}")
    solvers = {"picard": _picard(), "damped": _damped(damping), "anderson": _anderson(memory)}
    if solver not in solvers:
        raise ValueError(f"solver: one of {', '.join(solvers)}, not {solver!r}")

    def limit(x: Array) -> Array:
        return absolute + tolerance * _norm(x)

    def solve(name: str) -> FixedPoint:
        return _solve(f, x, solvers[name], limit, max_steps)

    result = solve(solver)
    if solver == "picard":
        return result
    return result._replace(distance=_norm(result.value - solve("picard").value))


def iterate(f: Callable, x: Float[Array, "b *image"], n: int) -> Float[Array, "b *image"]:
    """Returns fⁿ(x)."""
    for _ in range(n):
        x = f(x)
    return x


class _Solver(NamedTuple):
    """An iteration rule; the first axis of every array is the batch.

    Attributes:
      init: x → memory.
      step: (memory, x, fx, n) → (memory, next x).
    """

    init: Callable[[Array], Any]
    step: Callable[[Any, Array, Array, Array], tuple[Any, Array]]


def _picard() -> _Solver:
    return _Solver(lambda x: (), lambda memory, x, fx, n: (memory, fx))


def _damped(damping: float) -> _Solver:
    return _Solver(lambda x: (), lambda memory, x, fx, n: (memory, x + damping * (fx - x)))


class _Differences(NamedTuple):
    """The memory of Anderson acceleration: the last f(x) and residual, and their differences.

    `fx_steps` and `residual_steps` are ring buffers.
    """

    fx: Float[Array, " d"]
    residual: Float[Array, " d"]
    fx_steps: Float[Array, "m d"]
    residual_steps: Float[Array, "m d"]


def _anderson(memory: int) -> _Solver:
    def init(x: Array) -> _Differences:
        last = jnp.zeros_like(x.reshape(x.shape[0], -1))
        ring = jnp.zeros((x.shape[0], memory, last.shape[1]), x.dtype)
        return _Differences(last, last, ring, ring)

    def step_image(past: _Differences, x: Array, fx: Array, n: Array) -> tuple[_Differences, Array]:
        residual = fx - x
        slot = (n - 1) % memory
        past = _Differences(
            fx,
            residual,
            # At the first step there is no difference yet. A zero row has no effect below.
            past.fx_steps.at[slot].set(jnp.where(n > 0, fx - past.fx, 0)),
            past.residual_steps.at[slot].set(jnp.where(n > 0, residual - past.residual, 0)),
        )
        # The normal equations of the least-squares problem are as small as the memory, while a
        # residual has as many values as an image. In full precision on every platform, because
        # the system is nearly singular.
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        gram = product(past.residual_steps, past.residual_steps.T)
        # A ridge at rounding level keeps the system solvable, because the differences become
        # parallel near the fixed point.
        scale = jnp.trace(gram)
        ridge = jnp.where(scale > 0, jnp.finfo(x.dtype).eps * scale, 1)
        gram = gram + ridge * jnp.eye(memory, dtype=x.dtype)
        coefficients = jnp.linalg.solve(gram, product(past.residual_steps, residual))
        return past, fx - product(coefficients, past.fx_steps)

    def step(past: _Differences, x: Array, fx: Array, n: Array) -> tuple[_Differences, Array]:
        flat, flat_fx = x.reshape(x.shape[0], -1), fx.reshape(x.shape[0], -1)
        past, next_x = jax.vmap(step_image, in_axes=(0, 0, 0, None))(past, flat, flat_fx, n)
        return past, next_x.reshape(x.shape)

    return _Solver(init, step)


class _Loop(NamedTuple):
    n: Int[Array, ""]
    active: Bool[Array, " b"]
    memory: Any
    result: FixedPoint


def _solve(
    f: Callable, x: Array, solver: _Solver, limit: Callable[[Array], Array], max_steps: int
) -> FixedPoint:
    batch = x.shape[0]
    zeros = jnp.zeros(batch, x.dtype)

    def body(loop: _Loop) -> _Loop:
        n, active, memory, past = loop
        # f runs on stopped images too, because shapes are static; `where` drops the result.
        x, fx = past.value, f(past.value)
        residual = _norm(fx - x)
        memory, next_x = solver.step(memory, x, fx, n)
        shape = (batch,) + (1,) * (x.ndim - 1)
        residual = jnp.where(active, residual, past.residual)
        converged = active & (residual <= limit(x))
        result = FixedPoint(
            value=jnp.where(active.reshape(shape), next_x, x),
            steps=past.steps + active,
            residual=residual,
            converged=past.converged | converged,
            trace=past.trace.at[:, n].set(residual),
            distance=zeros,
        )
        return _Loop(n + 1, active & ~converged & jnp.isfinite(residual), memory, result)

    start = FixedPoint(
        value=x,
        steps=jnp.zeros(batch, jnp.int32),
        residual=zeros,
        converged=jnp.zeros(batch, bool),
        # Arrays cannot grow in a loop, so there is a column for every step that may be taken.
        trace=jnp.zeros((batch, max_steps), x.dtype),
        distance=zeros,
    )
    # A while loop, because the number of steps depends on the images.
    loop = jax.lax.while_loop(
        lambda loop: (loop.n < max_steps) & jnp.any(loop.active),
        body,
        _Loop(jnp.int32(0), jnp.ones(batch, bool), solver.init(x), start),
    )
    # The loop runs until the slowest image has stopped. An image's trace must not depend on that,
    # so the entries after its own last step are overwritten.
    taken = jnp.arange(max_steps)[None, :] < loop.result.steps[:, None]
    trace = jnp.where(taken, loop.result.trace, loop.result.residual[:, None])
    return loop.result._replace(trace=trace)


def _norm(x: Float[Array, "b *image"]) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1))
