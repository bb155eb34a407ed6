"""Quantiles of magnitudes over many arrays (or their shards), without sorting."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rmsprop_jax.storage._place import split_axes, whole_sum


def checked_quantiles(quantiles: Sequence[float]) -> tuple[float, ...]:
    try:
        shares = tuple(float(q) for q in quantiles)
    except (OverflowError, TypeError, ValueError):
        shares = ()
    if not shares or not all(0 <= q <= 1 for q in shares):
        raise ValueError(f'quantiles must be one or more numbers in [0, 1], got {quantiles!r}.')
    return shares


def quantiles(name: str, leaves: list[jax.Array], shares: Sequence[float]) -> jax.Array:
    """Quantiles of the magnitudes of all leaves' entries, one for each share in [0, 1].

    A quantile is the smallest magnitude that this share of the entries does not exceed.

    Raises:
      ValueError: If the group called `name` has too many entries to count.
    """
    size = sum(map(whole_size, leaves))
    if size >= 2**32:
        raise ValueError(f'the group {name!r} has more than 2^32 entries: give finer labels.')
    ranks = tuple(max(1, math.ceil(share * size)) for share in shares)
    return _order_statistics(leaves, ranks)


@functools.partial(jax.jit, static_argnums=1)
def _order_statistics(leaves: list[jax.Array], ranks: tuple[int, ...]) -> jax.Array:
    """The magnitudes of these ranks, or zeros if there are no entries.

    Bisects over the bits of float32, which have the same order as the numbers.
    """
    bits = [lax.bitcast_convert_type(as_float32(leaf), jnp.uint32) for leaf in leaves]

    def count_below(bound: jax.Array) -> jax.Array:
        return sum((count_true(leaf < bound) for leaf in bits), jnp.uint32(0))

    def next_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        guess = found | (jnp.uint32(2**30) >> i.astype(jnp.uint32))
        below = jnp.stack([count_below(guess[k]) for k in range(len(ranks))])
        return jnp.where(below < jnp.array(ranks, jnp.uint32), guess, found)

    if not any(leaf.size for leaf in leaves):
        return jnp.zeros(len(ranks), jnp.float32)
    found = lax.fori_loop(0, 31, next_bit, jnp.zeros(len(ranks), jnp.uint32))
    return lax.bitcast_convert_type(found, jnp.float32)


def count_true(mask: jax.Array) -> jax.Array:
    """The number of true entries, over all devices that hold a share under `jax.shard_map`.

    Float32 sums are twice as fast on a CPU, but exact only up to 2^24.
    """
    rows = jnp.atleast_1d(mask)
    dtype = jnp.float32 if rows.shape[-1] < 2**24 else jnp.uint32
    own = jnp.sum(jnp.sum(rows, axis=-1, dtype=dtype).astype(jnp.uint32), dtype=jnp.uint32)
    return whole_sum(own, split_axes(mask))


def whole_size(x: jax.Array) -> int:
    """The number of entries, over all devices that hold a share under `jax.shard_map`."""
    return x.size * math.prod(map(lax.axis_size, split_axes(x)))


def as_float32(x: jax.Array) -> jax.Array:
    """The magnitudes in float32."""
    return jnp.abs(x).astype(jnp.float32)
