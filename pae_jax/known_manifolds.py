"""Image manifolds in closed form: a plane, and a circle or sphere.

On these the projection, the slices of Theorem 2 and the conditional means of Theorem 1 and
Proposition 1 have closed forms, so that theory and code can be checked without training. All
functions take and return images (b, h, w, 1); a region S is a boolean image (h, w, 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

MIDDLE = 0.5  # both manifolds are centred in the range of pixel values


class Plane(NamedTuple):
    """The plane {½ + Σ zᵢ·basisᵢ}, with z ~ N(0, scale²·I).

    Attributes:
      basis: (k, h, w, 1), orthonormal.
      scale: the standard deviation of the coefficients z.
    """

    basis: Float[Array, "k h w 1"]
    scale: float = 0.1

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "b h w 1"]:
        """Draws images from the distribution on the plane."""
        z = self.scale * jax.random.normal(key, (count, len(self.basis)), self.basis.dtype)
        return self._image(z)

    def project(self, x: Float[Array, "b h w 1"]) -> Float[Array, "b h w 1"]:
        """Returns the nearest point of ℳ."""
        return self._image(self._coefficients(x))

    def project_slice(
        self, x: Float[Array, "b h w 1"], region: Bool[Array, "h w 1"]
    ) -> Float[Array, "b h w 1"]:
        """Returns the nearest point of the slice ℳ_S(x) of Theorem 2: equal to x outside S."""
        known, free = self._known_and_free(x, region)
        # A free direction is 0 outside S, so the basis is orthonormal on S along it.
        return self._image(known + self._coefficients(x) @ free)

    def conditional_mean(
        self, x: Float[Array, "b h w 1"], region: Bool[Array, "h w 1"]
    ) -> Float[Array, "b h w 1"]:
        """Returns E[x | x outside S], the optimum of Theorem 1.

        The corrupted values in S are assumed to be independent of x.
        """
        return self._image(self._known_and_free(x, region)[0])

    def _image(self, z: Float[Array, "b k"]) -> Float[Array, "b h w 1"]:
        return MIDDLE + jnp.tensordot(z, self.basis, 1)

    def _coefficients(self, x: Float[Array, "b h w 1"]) -> Float[Array, "b k"]:
        return jnp.tensordot(x - MIDDLE, self.basis, ((1, 2, 3), (1, 2, 3)))

    def _known_and_free(
        self, x: Float[Array, "b h w 1"], region: Bool[Array, "h w 1"]
    ) -> tuple[Float[Array, "b k"], Float[Array, "k k"]]:
        """Returns the smallest z that explains x outside S, and a projector.

        The projector maps z to its part that does not change the image outside S.
        """
        outside = jnp.where(region[None], 0, self.basis).reshape(len(self.basis), -1)
        inverse = jnp.linalg.pinv(outside)
        known = (x - MIDDLE).reshape(len(x), -1) @ inverse
        return known, jnp.eye(len(outside), dtype=x.dtype) - outside @ inverse


class Sphere(NamedTuple):
    """The sphere of images with constant columns ½ + m, ‖m‖ = radius; uniform in m.

    It is a circle for two columns and a sphere for three. Regions are whole columns.

    Attributes:
      columns: the width of the images, and the number of coordinates m.
      rows: the height of the images.
      radius: ‖m‖.
    """

    columns: int = 2
    rows: int = 4
    radius: float = 0.4

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "b h w 1"]:
        """Draws images uniformly from the sphere."""
        return self._on_sphere(jax.random.normal(key, (count, self.columns)))

    def project(self, x: Float[Array, "b h w 1"]) -> Float[Array, "b h w 1"]:
        """Returns the nearest point of ℳ."""
        return self._on_sphere(self.coordinates(x))

    def project_slice(
        self, x: Float[Array, "b h w 1"], region: Bool[Array, "h w 1"]
    ) -> Float[Array, "b h w 1"]:
        """Returns the nearest point of the slice ℳ_S(x) of Theorem 2: equal to x outside S."""
        m, inside = self.coordinates(x), region[0, :, 0][None]
        known = jnp.where(inside, 0, m)
        # The norm left for the free coordinates; 0 if the known ones exceed the radius.
        rest = jnp.sqrt(jnp.maximum(self.radius**2 - jnp.sum(known**2, axis=1, keepdims=True), 0))
        free = jnp.where(inside, m, 0)
        return self.image(known + rest * free / jnp.linalg.norm(free, axis=1, keepdims=True))

    def conditional_mean(
        self, x: Float[Array, "b h w 1"], region: Bool[Array, "h w 1"]
    ) -> Float[Array, "b h w 1"]:
        """Returns E[x | x outside S], the optimum of Theorem 1.

        The corrupted values in S are assumed to be independent of x.
        """
        # The free coordinates are uniform on a circle, or on two points, around 0.
        return jnp.where(region[None], MIDDLE, x)

    def coordinates(self, x: Float[Array, "b h w 1"]) -> Float[Array, "b n"]:
        """Returns m, the mean of each column relative to ½."""
        return jnp.mean(x - MIDDLE, axis=(1, 3))

    def image(self, m: Float[Array, "b n"]) -> Float[Array, "b h w 1"]:
        """Returns the images with the constant columns ½ + m."""
        column = MIDDLE + m[:, None, :, None]
        return jnp.broadcast_to(column, (len(m), self.rows, self.columns, 1))

    def _on_sphere(self, m: Float[Array, "b n"]) -> Float[Array, "b h w 1"]:
        return self.image(self.radius * m / jnp.linalg.norm(m, axis=1, keepdims=True))

    # Normal-dominant corruption of all coordinates at once (eqs. 13 and 14, Proposition 1).

    def displace(
        self, key: Key[Array, ""], x: Float[Array, "b h w 1"], eta: float, reach: float
    ) -> Float[Array, "b h w 1"]:
        """Draws x̂ = x + αδ uniformly from the double cone ‖tangential‖ ≤ η‖normal‖.

        It is defined for two or three columns.

        Args:
          key: for the random displacements.
          x: images on the sphere.
          eta: η, the tangent of the aperture of the cone.
          reach: ‖δ‖ < radius, the largest displacement; α has a positive density on (0, 1].
        """
        keys = jax.random.split(key, 4)
        normal = self.coordinates(x) / self.radius
        shape, n = (len(x), 1), self.columns
        aperture = jnp.arctan(eta)
        # The root makes the points uniform, because the volume within a radius grows as its n-th
        # power.
        length = reach * jax.random.uniform(keys[0], shape) ** (1 / n)
        u = jax.random.uniform(keys[1], shape)
        # On a sphere the area of a cap grows as 1 − cos of its angle, on a circle as the angle.
        angle = {2: aperture * u, 3: jnp.arccos(1 - u * (1 - jnp.cos(aperture)))}[n]
        tangent = jax.random.normal(keys[2], normal.shape)
        # A Gaussian has no preferred direction, and so neither has its part in the tangent space.
        tangent -= jnp.sum(tangent * normal, axis=1, keepdims=True) * normal
        tangent /= jnp.linalg.norm(tangent, axis=1, keepdims=True)
        # The cone is double: one half points outwards, the other inwards.
        sign = jax.random.rademacher(keys[3], shape, normal.dtype)
        step = sign * length * (jnp.cos(angle) * normal + jnp.sin(angle) * tangent)
        return self.image(self.coordinates(x) + step)

    def compatible_angle(self, x: Float[Array, "b h w 1"], eta: float) -> Float[Array, " b"]:
        """Returns half the angle, seen from the centre, of the cap of sources compatible with x.

        The compatible normal sources (eq. 15) of `displace` for x at distance r from the centre
        form a cap around the direction of x: the line from a source to x is within β = arctan η
        of the normal of that source. By the law of sines its half angle is
        |arcsin(radius/r·sin β) − β|. The diameter of eq. 16 is 2·radius·sin of this angle. This
        holds if the whole cap is within reach of x and r > radius·sin β.
        """
        r = jnp.linalg.norm(self.coordinates(x), axis=1)
        aperture = jnp.arctan(eta)
        return jnp.abs(jnp.arcsin(self.radius / r * jnp.sin(aperture)) - aperture)

    def mean_of_compatible(self, x: Float[Array, "b h w 1"], eta: float) -> Float[Array, "b h w 1"]:
        """Returns E[source | x] under `displace`, the Bayes optimum f* of Proposition 1 (eq. 12).

        The sources are uniform on the cap, because the displacements are uniform in their cone.
        """
        angle = self.compatible_angle(x, eta)
        # These are the means of the cosine over an arc, sin(a)/a, and over a cap of the sphere.
        # `sinc` has the right limit at 0.
        mean_cosine = {2: jnp.sinc(angle / jnp.pi), 3: (1 + jnp.cos(angle)) / 2}[self.columns]
        m = self.coordinates(x)
        direction = m / jnp.linalg.norm(m, axis=1, keepdims=True)
        return self.image(self.radius * mean_cosine[:, None] * direction)


def slice_contraction(
    manifold: Plane | Sphere, region: Bool[Array, "h w 1"], ratio: float
) -> Callable[[Float[Array, "b h w 1"]], Float[Array, "b h w 1"]]:
    """Returns an f with the properties (i)–(iii) of Theorem 2.

    f keeps x outside S. Inside S it moves x on a straight line towards the nearest point of the
    slice, to `ratio` = ρ times the distance.
    """

    def f(x: Float[Array, "b h w 1"]) -> Float[Array, "b h w 1"]:
        target = manifold.project_slice(x, region)
        return jnp.where(region[None], target + ratio * (x - target), x)

    return f
