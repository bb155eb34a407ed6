"""Stochastic rounding: random bits for every entry of an array, and the unit of the grid.

Rounding to the nearest stalls a running average as soon as one step moves it by less than half a
grid point. Rounded up with the probability of the distance that is left, it is right on average.
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
from rmsprop_jax.storage._place import manual_axes, whole_shape

# Of the bits this rounds to the nearest.
HALF = np.uint32(2**31)


def leaf_key(seed: int, label: str) -> np.uint32:
    """What makes the bits of one leaf differ from those of others."""
    return np.uint32(zlib.crc32(f'{seed} {label}'.encode()))


def salt(key: ArrayLike, count: ArrayLike) -> jax.Array:
    """What makes the bits of one leaf at one step: a scalar, the same on every mesh."""
    return _hashed(jnp.asarray(count, jnp.uint32) * np.uint32(0x9E3779B9) + key)


def random_bits(
    shape: tuple[int, ...], salt: jax.Array, spec: PartitionSpec | None = None
) -> jax.Array:
    """32 bits for every entry, a function of the salt and of the entry's index alone.

    A counter hash costs a ninth of Threefry. The sequence of bits that an entry gets must not be
    equidistributed in time: rounding to 8 bits with such a sequence is biased by up to 20 %.

    Args:
      shape: Of the array, or of one device's share of it under `jax.shard_map`.
      salt: What `salt` returned.
      spec: How the array is partitioned under `jax.shard_map`; None means not at all. Entries are
        then counted in the whole array.
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

    Stored averages are multiples of the unit. It shrinks as they do, so that an entry whose
    gradient is zero keeps its stored number and is not rounded at all: only what a gradient adds
    is. That halves the error of a slow average, and keeps silent entries from wandering.
    """
    shrunk = unit * cast(decay, unit.dtype)
    vanishes = shrunk < float(jnp.finfo(unit.dtype).tiny)
    power = power_below(jnp.where(vanishes, 1, shrunk))
    # Which grid numbers are rounded to has no derivative.
    return lax.stop_gradient(jnp.where(vanishes, 1, shrunk / power))


def power_below(x: jax.Array) -> jax.Array:
    """The largest power of two that is not larger than `x`, a positive normal number."""
    power = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=0)
    return jnp.where(power > x, power * 0.5, power)
