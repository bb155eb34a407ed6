"""Placement of arrays: constants placed like a parameter, and shares under shard_map."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

Shape = tuple[int, ...]


def full_like(param: Any, fill: Any, dtype: DTypeLike, without: int | None = None) -> jax.Array:
    """An array of the parameter's shape and placement, filled with one number.

    Args:
      param: The parameter: an array or a `jax.ShapeDtypeStruct`.
      fill: The number, possibly traced.
      dtype: The dtype of the result.
      without: An axis of the parameter that the result lacks, counted from the end.
    """
    if not isinstance(param, Tracer):
        # An uncommitted array may move to wherever it is needed, and so may its statistics.
        placed = getattr(param, 'committed', True)
        sharding = getattr(param, 'sharding', None) if placed else None
        shape = jnp.shape(param)
        if without is not None:
            sharding = _without_axis(sharding, without, len(shape))
            shape = shape[:without] + shape[len(shape) + without + 1 :]
        return _fill(sharding)(fill, shape, np.dtype(dtype))
    # Under jit a constant does not take part in sharding propagation and would be replicated. An
    # elementwise function of the parameter does, on meshes with automatic and with explicit axes,
    # and it stays in the parameter's memory. This one is zero, but the barrier hides that from the
    # compiler until shardings are settled.
    known = lax.eq(param, param)
    zeros = known ^ lax.optimization_barrier(known)
    if without is not None:
        zeros = jnp.any(zeros, axis=without)
    return zeros.astype(dtype) + jnp.asarray(fill, dtype)


@functools.lru_cache(maxsize=256)
def _fill(sharding: Any) -> Callable[..., jax.Array]:
    # Outside of jit, a compiled call costs a fraction of `jnp.full`. If `fill` is an array, the
    # result does not share its buffer.
    def full(fill: Any, shape: Shape, dtype: np.dtype) -> jax.Array:
        return jnp.full(shape, fill, dtype)

    placed = {} if sharding is None else {'out_shardings': sharding}
    return jax.jit(full, static_argnums=(1, 2), inline=True, **placed)


def unshared(tree: Any, *arguments: Any) -> Any:
    """Copies each array of `tree` that is also in the arguments or twice in `tree`, so that any of
    them may be donated."""
    seen = {id(x) for x in jax.tree.leaves(arguments)}

    def leaf(x: Any) -> Any:
        if id(x) in seen and isinstance(x, jax.Array) and not isinstance(x, Tracer):
            x = x.copy()
        seen.add(id(x))
        return x

    return jax.tree.map(leaf, tree)


def without_axis(spec: PartitionSpec, axis: int, ndim: int) -> PartitionSpec:
    """The partition without one of the axes, which is counted from the end."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    del entries[axis]
    return PartitionSpec(*entries)


def axis_names(entry: str | Iterable[str] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def manual_axes(spec: PartitionSpec | None, axis: int) -> tuple[str, ...]:
    """The mesh axes over which `jax.shard_map` splits an axis of an array."""
    entry = spec[axis] if spec is not None and axis < len(spec) else None
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in axis_names(entry) if name in manual)


def whole_shape(shape: Shape, spec: PartitionSpec | None) -> Shape:
    """The shape of a whole array, from the shape of one device's share and the partition."""
    if spec is None:
        return shape
    return tuple(n * _devices(manual_axes(spec, axis)) for axis, n in enumerate(shape))


def possible_shapes(x: Any) -> list[Shape]:
    """The possible shapes of the whole array of which `x` is a share under `jax.shard_map`.

    Only the shape of `x` itself is possible if shard_map knows that `x` is equal on all devices.
    """
    unknown = {
        name
        for name in jax.sharding.get_abstract_mesh().manual_axes
        if name in varying_axes(x) or name not in varying_axes(lax.axis_index(name))
    }
    shape, parts = jnp.shape(x), _devices(tuple(unknown))
    split = [(*shape[:i], n * parts, *shape[i + 1 :]) for i, n in enumerate(shape)]
    return [shape, *split] if parts > 1 else [shape]


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes along which `x` differs between devices, as far as shard_map tracks it."""
    kind = jax.typeof(x)
    # JAX before 0.10 has the set here.
    return frozenset(
        kind.manual_axis_type.varying if hasattr(kind, 'manual_axis_type') else kind.vma
    )


def split_axes(x: Any, spec: PartitionSpec | None = None) -> tuple[str, ...]:
    """The mesh axes whose devices hold different parts of `x` under `jax.shard_map`: those in the
    partition or, if there is none, those that shard_map tracks."""
    if spec is None:
        return tuple(sorted(varying_axes(x)))
    return tuple(name for axis in range(len(spec)) for name in manual_axes(spec, axis))


def whole_sum(x: Any, axes: tuple[str, ...]) -> jax.Array:
    """The sum over devices that hold different parts."""
    return lax.psum(x, axes) if axes else x


def _devices(names: tuple[str, ...]) -> int:
    return math.prod(map(lax.axis_size, names))


def _without_axis(sharding: Any, axis: int, ndim: int) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = without_axis(sharding.spec, axis, ndim)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
