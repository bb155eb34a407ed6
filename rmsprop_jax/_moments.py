"""The mathematics of RMSProp for one array. Everything else in the package lifts it over trees.

Arrays are float32 or wider (complex allowed for gradients and means); scalars are Python numbers or
arrays of the same precision. See the package documentation for the derivation of the variance
recurrence.
"""

import jax
import jax.numpy as jnp

from rmsprop_jax._types import Scalar


def squared_magnitude(x: jax.Array) -> jax.Array:
    """`|x|^2`, differentiable at zero for complex arrays too."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def second_moment(nu: jax.Array, g: jax.Array, decay: Scalar, complement: Scalar) -> jax.Array:
    """`nu <- decay nu + (1 - decay) |g|^2`."""
    return decay * nu + complement * squared_magnitude(g)


def averaging_weight(weight: jax.Array, decay: Scalar, complement: Scalar) -> jax.Array:
    """`c <- decay c + (1 - decay)`, the sum of the weights given to gradients so far."""
    return decay * weight + complement


def mean(mu: jax.Array, g: jax.Array, complement: Scalar) -> jax.Array:
    """`mu <- mu + (1 - decay) (g - mu)`."""
    return mu + complement * (g - mu)


def variance(
    var: jax.Array,
    mu: jax.Array,
    g: jax.Array,
    decay: Scalar,
    complement: Scalar,
    weights: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """`var <- decay (var + (1 - decay) (c_before / c_after) |g - mu / c_before|^2)`, with the mean
    before this step.

    `weights` holds `(c_before, c_after)`; None means that both are one. Unlike `nu - |mu|^2` it is
    a sum of non-negative terms, so it neither cancels nor turns negative.
    """
    share: Scalar = 4 * decay * complement
    centre = mu
    if weights is not None:
        before, after = weights
        share = share * (before / after)
        # Before the first step there is no mean: the share is zero, and the division must not make
        # a NaN of it.
        centre = mu / jnp.where(before == 0, 1, before)
    # Halving the deviation keeps its square within range whenever |g|^2 is. The factor of four goes
    # to the share, which stays at or below one.
    return decay * var + share * squared_magnitude(0.5 * (g - centre))


def direction(g: jax.Array, moment: jax.Array, eps: Scalar, eps_in_sqrt: bool) -> jax.Array:
    """`g / sqrt(moment + eps)`, or `g / (sqrt(moment) + eps)`; zero where the root underflows to
    zero.

    Subnormal numbers count as zero, as accelerators have it, and both square root and quotient are
    selected twice so that derivatives through a zero stay finite. Comparisons are written so that
    NaN passes through.
    """
    root = _sqrt(moment + eps) if eps_in_sqrt else _sqrt(moment) + eps
    vanishes = root < _smallest_normal(root)
    return jnp.where(vanishes, 0, g / jnp.where(vanishes, 1, root))


def _sqrt(x: jax.Array) -> jax.Array:
    vanishes = x < _smallest_normal(x)
    return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, x)))


def _smallest_normal(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).tiny)
