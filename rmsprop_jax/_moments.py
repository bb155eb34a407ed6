"""The mathematics of RMSProp for one array. Everything else in the package lifts it over trees.

Arrays are float32 or wider (complex allowed for gradients and means); scalars are Python numbers or
arrays of the same precision. See the package documentation for the derivation of the variance
recurrence.
"""

import operator
from collections.abc import Callable
from typing import Any

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
    """`x^(1 / order)`, differentiable at zero; its argument is not negative."""
    vanishes = x == 0
    positive = jnp.where(vanishes, 1, x)
    return jnp.where(vanishes, 0, jnp.sqrt(positive) if order == 2 else positive ** (1 / order))


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
        # Before the first step there is no mean: the share is zero, and the division must not make
        # a NaN of it.
        centre = componentwise(operator.truediv, mu, jnp.where(weight == 0, 1, weight))
    # The deviation may be twice the largest |g| whose square is representable, and what the share
    # makes of it is at most half of that: multiplied in this order nothing overflows. (XLA merges
    # factors that stand on both sides, so scaling the deviation before squaring it would not help.)
    deviation = g - centre
    return decay * var + _real_product(componentwise(operator.mul, deviation, share), deviation)


def reciprocal_or_zero(x: Any) -> Any:
    """`1 / x`, and 0 where `x` is not a normal number."""
    if not isinstance(x, jax.Array):
        return 1 / x if x >= _smallest_normal(x) else 0 * x
    vanishes = x < _smallest_normal(x)
    return jnp.where(vanishes, 0, 1 / jnp.where(vanishes, 1, x))


def direction(
    g: jax.Array, moment: jax.Array, eps: Scalar, eps_in_sqrt: bool, rounds: bool = False
) -> jax.Array:
    """`g / sqrt(moment + eps)`, or `g / (sqrt(moment) + eps)`; zero where the root underflows to
    zero.

    Subnormal numbers count as zero, as accelerators have it, and both square root and quotient are
    selected twice so that derivatives through a zero stay finite. Comparisons are written so that
    NaN passes through. Where epsilon is known to be positive the root cannot vanish. `rounds` says
    that the moment is kept in a format that rounds.
    """
    if isinstance(eps, float) and eps >= _smallest_normal(moment):
        root = _apart(jnp.sqrt(moment + eps), rounds) if eps_in_sqrt else _sqrt(moment) + eps
        return componentwise(operator.truediv, g, root)
    root = _sqrt(moment + eps) if eps_in_sqrt else _sqrt(moment) + eps
    vanishes = root < _smallest_normal(root)
    quotient = componentwise(operator.truediv, g, jnp.where(vanishes, 1, root))
    return jnp.where(vanishes, 0, quotient)


def _apart(root: jax.Array, rounds: bool) -> jax.Array:
    """A positive root that XLA does not make one operation with the quotient by it.

    Multiplying with a reciprocal root rounds differently from the same step without jit. The
    maximum never acts. With formats that round it is left out on TPUs, whose compiler splits long
    steps where the two are apart.
    """

    def apart(root: jax.Array) -> jax.Array:
        return jnp.maximum(root, _smallest_normal(root))

    if not rounds:
        return apart(root)
    return lax.platform_dependent(root, tpu=lambda root: root, default=apart)


def componentwise(
    op: Callable[[jax.Array, Scalar], jax.Array], x: jax.Array, real: Scalar
) -> jax.Array:
    """`op(x, real)`, on real and imaginary parts apart where `x` is complex.

    A complex product or quotient would do three times the work, and strict dtype promotion forbids
    to mix the two.
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
