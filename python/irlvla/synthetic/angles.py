"""Sine, cosine and arctangent in plain arithmetic, and random numbers in a range: the same bits on every machine.

Vectorised libraries differ in the last bit from one instruction set to another, and a simulation carries such a bit on.
Additions, multiplications, divisions and square roots are exact to the bit everywhere. The polynomials are those of fdlibm
(k_sin.c, k_cos.c, s_atan.c), with errors below 1e-15.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# A quarter turn, in two parts: a small multiple of the first is exact.
_QUARTER, _QUARTER_REST = 1.57079632673412561417e00, 6.07710050650619224932e-11
_AHEAD, _ACROSS = np.array([1.0, 0.0, -1.0, 0.0]), np.array([0.0, 1.0, 0.0, -1.0])  # cosine and sine of quarters
_SIN = (
    -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04, 2.75573137070700676789e-06,
    -2.50507602534068634195e-08, 1.58969099521155010221e-10,
)  # fmt: skip
_COS = (
    4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05, -2.75573143513906633035e-07,
    2.08757232129817482790e-09, -1.13596475577881948265e-11,
)  # fmt: skip
_ATAN = (
    3.33333333333329318027e-01, -1.99999999998764832476e-01, 1.42857142725034663711e-01, -1.11111104054623557880e-01,
    9.09088713343650656196e-02, -7.69187620504482999495e-02, 6.66107313738753120669e-02, -5.83357013379057348645e-02,
    4.97687799461593236017e-02, -3.65315727442169155270e-02, 1.62858201153657823623e-02,
)  # fmt: skip


def cosine_sine(angle: ArrayLike) -> tuple[Array, Array]:
    """Cosine and sine of angles up to some thousand turns."""
    angle = np.asarray(angle, dtype=np.float64)
    quarters = np.rint(angle * (2.0 / math.pi))
    cosine, sine = _near_zero((angle - quarters * _QUARTER) - quarters * _QUARTER_REST)
    quadrant = quarters.astype(np.int64) & 3
    ahead, across = _AHEAD[quadrant], _ACROSS[quadrant]
    return ahead * cosine - across * sine, across * cosine + ahead * sine


def cosine_sine_of(angle: float) -> tuple[float, float]:
    """The same of one number, as quick as Python can."""
    quarters = round(angle * (2.0 / math.pi))
    cosine, sine = _near_zero((angle - quarters * _QUARTER) - quarters * _QUARTER_REST)
    return ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))[quarters & 3]


def angle_of(x: ArrayLike, y: ArrayLike) -> Array:
    """The direction of vectors, in [-pi, pi]; 0 for the zero vector."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    across, along = np.abs(y), np.abs(x)
    low, high = np.minimum(across, along), np.maximum(across, along)
    high = np.where(high > 0.0, high, 1.0)
    # Twice reduced: to the first octant, then around an eighth of a turn, for a polynomial that holds below 7/16.
    steep = low > 0.41421356237309503 * high
    slope = np.where(steep, (low - high) / (low + high), low / high)
    square = slope * slope
    angle = slope - slope * (square * _polynomial(square, _ATAN)) + np.where(steep, math.pi / 4, 0.0)
    angle = np.where(across > along, math.pi / 2 - angle, angle)
    angle = np.where(x < 0.0, math.pi - angle, angle)
    return np.where(y < 0.0, -angle, angle)


def wrap(angle: Array) -> Array:
    """The same directions within half a turn of zero."""
    return angle - np.rint(angle * (0.5 / math.pi)) * (2.0 * math.pi)


def between(rng: np.random.Generator, low: float, high: float, size: int | None = None):  # type: ignore[no-untyped-def]
    """Uniform random numbers; `Generator.uniform` may be compiled to a fused operation that rounds otherwise."""
    return low + (high - low) * rng.random(size)


def _near_zero(angle):  # type: ignore[no-untyped-def]
    """Cosine and sine for |angle| <= pi / 4, of a number or of an array."""
    square = angle * angle
    cosine = 1.0 - (0.5 * square - square * (square * _polynomial(square, _COS)))
    return cosine, angle + angle * (square * _polynomial(square, _SIN))


def _polynomial(x, coefficients: tuple[float, ...]):  # type: ignore[no-untyped-def]
    """Horner's rule, constant first."""
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
