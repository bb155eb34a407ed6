"""Constant arrays that are sharded and placed like a parameter."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike


def full_like(param: Any, fill: Any, dtype: DTypeLike, without: int | None = None) -> jax.Array:
    """An array of one number.

    Args:
      param: The parameter: an array or a `jax.ShapeDtypeStruct`.
      fill: The number, possibly traced.
      dtype: Of the result.
      without: An axis of the parameter that the result does not have, counted from the end.
    """
    if not isinstance(param, Tracer):
        # An array that nobody has placed may go wherever it is needed, and so may its statistics.
        placed = getattr(param, 'committed', True)
        sharding = getattr(param, 'sharding', None) if placed else None
        shape = jnp.shape(param)
        if without is not None:
            sharding = _without_axis(sharding, without, len(shape))
            shape = shape[:without] + shape[len(shape) + without + 1 :]
        filled = jnp.full(shape, fill, dtype, device=sharding)
        # A scalar filled with an array is that array: shared, it could not be donated.
        return filled.copy() if isinstance(fill, jax.Array) else filled
    # Under jit a constant does not take part in sharding propagation and would be replicated. An
    # elementwise function of the parameter does, on meshes with automatic and with explicit axes,
    # and it stays in the parameter's memory. This one is zero, but no compiler sees it before
    # shardings are settled: behind the barrier there might be anything.
    known = lax.eq(param, param)
    zeros = known ^ lax.optimization_barrier(known)
    if without is not None:
        zeros = jnp.any(zeros, axis=without)
    return zeros.astype(dtype) + jnp.asarray(fill, dtype)


def without_axis(spec: PartitionSpec, axis: int, ndim: int) -> PartitionSpec:
    """A partition of all axes but one, which is counted from the end."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    del entries[axis]
    return PartitionSpec(*entries)


def axis_names(entry: str | Iterable[str] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _without_axis(sharding: Any, axis: int, ndim: int) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = without_axis(sharding.spec, axis, ndim)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
