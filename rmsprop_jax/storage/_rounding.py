"""Stochastic rounding: random bits for every entry of an array, and the unit of the grid.

With round-to-nearest, a running average stalls once a step moves it by less than half the distance
between grid points. Stochastic rounding goes up with a probability that grows linearly from 0 at
the lower grid point to 1 at the upper one, and so is right on average.
"""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from rmsprop_jax._types import Scalar, cast
from rmsprop_jax.storage._place import Shape, manual_axes, whole_shape

# These bits round to nearest.
HALF = np.uint32(2**31)


def leaf_key(seed: int, label: str) -> np.uint32:
    """A number that gives each leaf its own random bits."""
    return np.uint32(zlib.crc32(f'{seed} {label}'.encode()))


def salt(key: ArrayLike, count: ArrayLike) -> jax.Array:
    """A scalar for the bits of one leaf at one step, the same on every mesh."""
    return _hashed(jnp.asarray(count, jnp.uint32) * np.uint32(0x9E3779B9) + key)


def random_bits(shape: Shape, salt: jax.Array, spec: PartitionSpec | None = None) -> jax.Array:
    """32 bits for every entry, which depend only on the salt and the entry's index.

    A counter hash costs a ninth of Threefry. The bits of an entry must not be equidistributed over
    time: rounding to 8 bits with such a sequence is biased by up to 20 %.

    Args:
      shape: The shape of the array, or of one device's share under `jax.shard_map`.
      salt: The result of `salt`.
      spec: The partition of the array under `jax.shard_map`, or None. With a partition, the index
        of an entry is its index in the whole array.
    """
    whole = whole_shape(shape, spec)
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        own = manual_axes(spec, axis)
        stride = np.uint32(math.prod(whole[axis + 1 :]) % 2**32)
        place = lax.broadcasted_iota(jnp.uint32, shape, axis)
        if own:
            place += lax.axis_index(own).astype(jnp.uint32) * np.uint32(shape[axis])
        index += place * stride
    return _hashed(index ^ salt)


def _hashed(x: jax.Array) -> jax.Array:
    """The integer hash `lowbias32` of C. Wellons, hash-prospector, with its improved constants."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0x735A2D97)
    return x ^ (x >> 15)


def next_unit(unit: jax.Array, decay: Scalar) -> jax.Array:
    """`unit <- decay unit`, times the power of two that brings it back into [1, 2).

    Stored averages are multiples of the unit, which shrinks as they do. So an entry whose gradient
    is zero keeps its stored number without rounding; only what a gradient adds is rounded. That
    halves the error of a slow average, and keeps entries without gradients from drifting.
    """
    shrunk = unit * cast(decay, unit.dtype)
    vanishes = shrunk < float(jnp.finfo(unit.dtype).tiny)
    power = power_below(jnp.where(vanishes, 1, shrunk))
    # The position of the grid has no derivative.
    return lax.stop_gradient(jnp.where(vanishes, 1, shrunk / power))


def power_below(x: jax.Array) -> jax.Array:
    """The largest power of two that is not larger than `x`, a positive normal number."""
    power = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=0)
    return jnp.where(power > x, power * 0.5, power)
