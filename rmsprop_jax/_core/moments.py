"""The mathematics of RMSProp for one array. Everything else in the package lifts it over trees.

Arrays are float32 or wider (complex allowed for gradients and means); scalars are Python numbers or
arrays of the same precision. See the package documentation for the derivation of the variance
recurrence.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rmsprop_jax._types import Scalar


def squared_magnitude(x: jax.Array) -> jax.Array:
    """`|x|^2`, differentiable at zero for complex arrays too."""
    return _real_product(x, x)


def magnitude(x: jax.Array) -> jax.Array:
    """`|x|`, differentiable at zero for complex arrays too."""
    return root_or_zero(squared_magnitude(x)) if jnp.iscomplexobj(x) else jnp.abs(x)


def root_or_zero(x: jax.Array, order: float = 2) -> jax.Array:
    """`x^(1 / order)` of a non-negative `x`, differentiable at zero."""
    vanishes = x == 0
    positive = jnp.where(vanishes, 1, x)
    return jnp.where(vanishes, 0, jnp.sqrt(positive) if order == 2 else positive ** (1 / order))


def kept_apart(root: jax.Array) -> jax.Array:
    """A positive root that XLA does not merge with the division by it.

    Merged, they become a multiplication by a reciprocal root, which rounds differently from the
    same step without jit. The maximum here never changes the root.
    """
    return jnp.maximum(root, _smallest_normal(root))


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a step computes for the format of its moment. The formulas stay the same.

    Attributes:
      largest: The largest number of the format; larger moments are clamped to it.
      from_old_mean: Whether a variance is measured from the mean before the step, not after it.
        Reading the old mean forces a copy on a CPU when the new mean takes its buffer.
      keep: Makes a root and the division by it stay two operations.
    """

    largest: float = math.inf
    from_old_mean: bool = False
    keep: Callable[[jax.Array], jax.Array] = kept_apart


class Scalars(NamedTuple):
    """The numbers of one step, in the dtype of the arithmetic.

    Attributes:
      decay: The decay of the averages.
      complement: `1 - decay`.
      eps: Epsilon.
      weights: The sum of the weights of an average before and after the step; None means one.
      unit: The unit of a moment that is stored with fewer digits; else 1.
    """

    decay: Scalar
    complement: Scalar
    eps: Scalar
    weights: tuple[jax.Array, jax.Array] | None = None
    unit: Scalar = 1


def plain_step(
    g: jax.Array, nu: jax.Array, by: Scalars, eps_in_sqrt: bool, is_positive: bool, way: Arithmetic
) -> tuple[jax.Array, jax.Array]:
    """The direction of `scale_by_rms` and the second moment after the step."""
    nu = second_moment(nu, g, by.decay, by.complement)
    moment = nu if by.weights is None else nu / by.weights[1]
    step = direction(g, moment, by.eps, eps_in_sqrt, is_positive=is_positive, keep=way.keep)
    return step, nu


def centered_step(
    g: jax.Array,
    var: jax.Array,
    mu: jax.Array,
    by: Scalars,
    eps_in_sqrt: bool,
    is_positive: bool,
    way: Arithmetic,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The direction of `scale_by_stddev`, and variance and mean after the step."""
    before, after = (None, None) if by.weights is None else by.weights
    ratio = 1.0 if by.weights is None else by.weights[0] / by.weights[1]
    saturated = var >= way.largest * by.unit
    new_mu = mean(mu, g, by.complement)
    if way.from_old_mean:
        share = by.decay * by.complement * ratio
        var = variance(var, g, mu, before, by.decay, share)
    else:
        share = by.complement * reciprocal_or_zero(by.decay * ratio)
        var = variance(var, g, new_mu, after, by.decay, share)
    moment = var if after is None else var / after
    if way.largest < float(jnp.finfo(var.dtype).max) / 2:
        # The true variance is larger, but unknown. With the squared mean added, the step has the
        # bound of the plain form.
        centre = new_mu if after is None else componentwise(operator.truediv, new_mu, after)
        moment += jnp.where(saturated, squared_magnitude(centre), 0)
    step = direction(g, moment, by.eps, eps_in_sqrt, is_positive=is_positive, keep=way.keep)
    return step, var, new_mu


def second_moment(nu: jax.Array, g: jax.Array, decay: Scalar, complement: Scalar) -> jax.Array:
    """`nu <- decay nu + (1 - decay) |g|^2`."""
    return decay * nu + complement * squared_magnitude(g)


def averaging_weight(weight: jax.Array, decay: Scalar, complement: Scalar) -> jax.Array:
    """`c <- decay c + (1 - decay)`, the sum of the weights given to gradients so far."""
    return decay * weight + complement


def mean(mu: jax.Array, g: jax.Array, complement: Scalar) -> jax.Array:
    """`mu <- mu + (1 - decay) (g - mu)`."""
    return mu + componentwise(operator.mul, g - mu, complement)


def variance(
    var: jax.Array, g: jax.Array, mu: jax.Array, weight: Any, decay: Scalar, share: Scalar
) -> jax.Array:
    """`var <- decay var + share |g - mu / weight|^2`, a sum of non-negative terms.

    With the mean before the step, its weight `c_before` and `share = decay (1 - decay) c_before /
    c_after` this is `nu - |mu|^2 / c`, which would cancel. After the step the deviation from the
    mean is `decay c_before / c_after` times what it was, so that with the mean after it, `c_after`
    and `share = (1 - decay) c_after / (decay c_before)` it is the same. The weights are None where
    they are one.
    """
    centre = mu
    if weight is not None:
        # Before the first step there is no mean. The share is zero, and the division must not turn
        # that into NaN.
        centre = componentwise(operator.truediv, mu, jnp.where(weight == 0, 1, weight))
    # The deviation may be twice the largest |g| whose square is representable. Times the share, it
    # is at most half of that |g|, so in this order nothing overflows. (XLA merges factors that are
    # on both sides, so scaling the deviation before squaring it would not help.)
    deviation = g - centre
    return decay * var + _real_product(componentwise(operator.mul, deviation, share), deviation)


def reciprocal_or_zero(x: Any) -> Any:
    """`1 / x`, and 0 where `x` is not a normal number."""
    if not isinstance(x, jax.Array):
        return 1 / x if x >= _smallest_normal(x) else 0 * x
    vanishes = x < _smallest_normal(x)
    return jnp.where(vanishes, 0, 1 / jnp.where(vanishes, 1, x))


def direction(
    g: jax.Array,
    moment: jax.Array,
    eps: Scalar,
    eps_in_sqrt: bool,
    *,
    is_positive: bool = False,
    keep: Callable[[jax.Array], jax.Array] = kept_apart,
) -> jax.Array:
    """`g / sqrt(moment + eps)`, or `g / (sqrt(moment) + eps)`; zero where the root underflows to
    zero.

    Subnormal numbers count as zero, as on accelerators. Square root and quotient each use two
    selects, so that derivatives through a zero stay finite. Comparisons are written so that NaN
    passes through. `is_positive` says that epsilon is a positive normal number, so that the root
    cannot vanish. `keep` makes root and quotient stay two operations.
    """
    if is_positive:
        root = keep(jnp.sqrt(moment + eps)) if eps_in_sqrt else _sqrt(moment) + eps
        return componentwise(operator.truediv, g, root)
    root = _sqrt(moment + eps) if eps_in_sqrt else _sqrt(moment) + eps
    vanishes = root < _smallest_normal(root)
    quotient = componentwise(operator.truediv, g, jnp.where(vanishes, 1, root))
    return jnp.where(vanishes, 0, quotient)


def componentwise(
    op: Callable[[jax.Array, Scalar], jax.Array], x: jax.Array, real: Scalar
) -> jax.Array:
    """`op(x, real)`, applied separately to the real and imaginary parts of a complex `x`.

    A complex product or quotient would do three times the work, and strict dtype promotion forbids
    mixing complex and real arrays.
    """
    if jnp.iscomplexobj(x):
        return lax.complex(op(x.real, real), op(x.imag, real))
    return op(x, real)


def _real_product(x: jax.Array, y: jax.Array) -> jax.Array:
    return x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y


def _sqrt(x: jax.Array) -> jax.Array:
    vanishes = x < _smallest_normal(x)
    return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, x)))


def _smallest_normal(x: Any) -> float:
    return float(jnp.finfo(jnp.result_type(x)).tiny)
