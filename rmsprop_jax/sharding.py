"""Where optimizer state lives on a mesh: sharded like the parameters, or over the data axis too.

JAX's SPMD engine does the work. This module adds what it cannot know: which parameter each array of
a state belongs to, and along which axes. See docs/scaling.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, reshard
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

from rmsprop_jax._checks import (
    broadcast_prefix,
    check_alike,
    checked_leaves,
    checked_params,
    checked_transformation,
    checked_updates,
)
from rmsprop_jax._core.wrapped import map_with_moments
from rmsprop_jax._types import KeyPath, by_path, canonical
from rmsprop_jax.storage._formats import Means, factored
from rmsprop_jax.storage._place import axis_names, varying_axes

__all__ = [
    'abstract_state',
    'offload',
    'reduce_scatter',
    'state_shardings',
    'zero1',
    'zero1_shardings',
]
__dir__ = __all__.copy

_HOST = 'pinned_host'


def state_shardings(tx: Any, params: Any, shardings: Any = None) -> Any:
    """The shardings of an optimizer's state, derived from those of the parameters.

    In every storage format, statistics have the sharding and memory of their parameter. Rows and
    columns of factored statistics omit the axis that they lack. Scalars, and everything else that
    is not shaped like a parameter, are replicated.

    Args:
      tx: The optimizer: any gradient transformation, with chains, masks, partitions and wrappers.
      params: The parameters, or their shapes: arrays or `jax.ShapeDtypeStruct`s, also inside
        `flax.nnx` variables.
      shardings: The shardings of the parameters: a tree like `params` or a prefix of it, of
        `NamedSharding`s or `PartitionSpec`s. None means the shardings that `params` have.

    Returns:
      A tree like `tx.init(params)`, with the same kind of leaves as `shardings`: `NamedSharding`s
      for `jit(out_shardings=...)`, or `PartitionSpec`s for `jax.shard_map(in_specs=...)`.

    Raises:
      ValueError: If `shardings` is None and a parameter has no sharding, or if `shardings` is not
        a tree like the parameters or a prefix of it.
      TypeError: If `tx` is not a transformation, or a leaf of `shardings` is not a sharding.

    Example:
      >>> import jax, jax.numpy as jnp, rmsprop_jax
      >>> from jax.sharding import PartitionSpec as P
      >>> from rmsprop_jax import sharding, storage
      >>> params = {'kernel': jax.ShapeDtypeStruct((512, 512), jnp.float32)}
      >>> tx = rmsprop_jax.scale_by_rms(storage=storage.factored())
      >>> specs = sharding.state_shardings(tx, params, {'kernel': P('data', 'model')})
      >>> specs.nu['kernel']
      Factors(row=P('data',), col=P('model',))
      >>> specs.count
      P()
    """
    checked_transformation('tx', tx)
    places = _of_params(params, shardings)
    program, state = jax.make_jaxpr(tx.init, return_shape=True)(params)
    # `zero1` constrains the state that `init` makes, wherever in the optimizer it is.
    constrained = _constraints(program.jaxpr)
    leaves, treedef = jax.tree.flatten(_of_state(tx, state, params, places))

    def chosen(place: Any, own: NamedSharding | None, result: Any) -> Any:
        if isinstance(place, PartitionSpec):
            return place if own is None else own.spec
        found = own or place
        # `offload` moves the state to the host's memory.
        is_moved = hasattr(jax, 'memory') and result.memory_space == jax.memory.Space.Host
        return found.with_memory_kind(_HOST) if is_moved else found

    return treedef.unflatten(map(chosen, leaves, constrained, program.out_avals))


def _constraints(program: Any) -> list[Any]:
    """The sharding on a mesh of devices that a program gives each of its results, or None.

    Shardings on abstract meshes are ignored: JAX adds them to constants by itself.
    """
    # Imported here because it loads Pallas, a quarter of the import time of this package.
    from jax.extend.core import Literal

    given = {}
    for eqn in program.eqns:
        if eqn.primitive.name in ('sharding_constraint', 'reshard'):
            found = eqn.params.get('sharding', eqn.params.get('dst_sharding'))
            mesh = eqn.params.get('concrete_mesh') or getattr(found, 'mesh', None)
            if isinstance(mesh, Mesh):
                given[eqn.outvars[0]] = NamedSharding(mesh, found.spec)
        elif eqn.primitive.name == 'device_put':
            moved = zip(eqn.outvars, eqn.invars, strict=True)
            given |= {
                out: given[x] for out, x in moved if not isinstance(x, Literal) and x in given
            }
    return [None if isinstance(out, Literal) else given.get(out) for out in program.outvars]


def abstract_state(tx: Any, params: Any, shardings: Any = None) -> Any:
    """Shapes, dtypes and shardings of the state that `tx.init` would make, without making it.

    Orbax restores into it, on any mesh that the parameters are on now.

    Args:
      tx: As for `state_shardings`.
      params: As for `state_shardings`.
      shardings: As for `state_shardings`, but only `NamedSharding`s.

    Example:
      >>> import jax, jax.numpy as jnp, rmsprop_jax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from rmsprop_jax import sharding
      >>> mesh = jax.make_mesh((1,), ('data',))
      >>> place = NamedSharding(mesh, P('data'))
      >>> params = {'kernel': jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=place)}
      >>> state = sharding.abstract_state(rmsprop_jax.rmsprop(1e-3), params)
      >>> kernel = state[0].nu['kernel']
      >>> kernel.dtype, kernel.sharding.spec
      (dtype('float32'), P('data',))
    """
    places = state_shardings(tx, params, shardings)
    return jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding), jax.eval_shape(tx.init, params), places
    )


def zero1_shardings(
    params: Any, shardings: Any = None, axis: str | tuple[str, ...] = 'data'
) -> Any:
    """The shardings of parameters, split over the data axis too.

    Splits the first unsharded axis of an array whose length the number of devices on the data axis
    divides. If there is none, splits the first axis whose part on each device can be divided once
    more. Otherwise the array keeps its sharding, as does an array that is already split over the
    data axis.

    Args:
      params: As for `state_shardings`.
      shardings: As for `state_shardings`, but only `NamedSharding`s.
      axis: The mesh axis, or axes, over which a batch is split.

    Returns:
      A tree of `NamedSharding`s like `params`, in device memory even if parameters are not.

    Raises:
      ValueError: If the mesh does not have the axis, or a parameter has no sharding.
      TypeError: If a sharding has no mesh.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> from rmsprop_jax import sharding
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ('data', 'model'))
      >>> place = jax.sharding.NamedSharding(mesh, P(None, 'model'))
      >>> params = {'a': jnp.zeros((64, 64)), 'b': jnp.zeros((501, 64)), 'c': jnp.zeros((3, 2))}
      >>> for name, split in sharding.zero1_shardings(params, place).items():
      ...     print(name, split.spec)
      a P('data', 'model')
      b P(None, ('model', 'data'))
      c P(None, 'model')
    """
    names = _checked_axis(axis)

    def leaf(path: KeyPath, param: Any, sharding: Any) -> NamedSharding:
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f'params{keystr(path)} has sharding {sharding!r}, but a NamedSharding is needed.'
            )
        unknown = [name for name in names if name not in sharding.mesh.shape]
        if unknown:
            raise ValueError(f'axis {unknown[0]!r} is not one of {sharding.mesh.axis_names}.')
        return NamedSharding(sharding.mesh, _split(jnp.shape(param), sharding, names))

    return tree_map_with_path(leaf, params, _of_params(params, shardings))


def zero1(
    tx: Any, params: Any, shardings: Any = None, axis: str | tuple[str, ...] = 'data'
) -> optax.GradientTransformationExtraArgs:
    """Splits the state of an optimizer over the data axis: ZeRO, stage 1.

    Each device keeps its share of the state and updates it with its share of the gradients and
    parameters; the updates are then gathered. The numbers are those of `tx`: only the device that
    computes them changes. `zero1` adds sharding constraints, which the compiler turns into
    communication: on GPUs a reduce-scatter of gradients and an all-gather of updates. TPUs also
    need `reduce_scatter`; see docs/scaling.md. `zero1` works under `jit` on meshes of `Auto` and of
    `Explicit` axes, and may stand anywhere among other transformations.

    Args:
      tx: The optimizer: any gradient transformation.
      params: The parameters, or their shapes: arrays or `jax.ShapeDtypeStruct`s.
      shardings: The shardings of the parameters, if `params` have none: a tree of `NamedSharding`s
        like `params` or a prefix of it. Updates have these shardings too.
      axis: The mesh axis, or axes, over which the batch is split, and now the state too.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state of `tx`, whose shardings are
      `state_shardings(tx, params, zero1_shardings(params, shardings, axis))`.

    Raises:
      ValueError: If the mesh does not have the axis, or a parameter has no sharding. `init` and
        `update` raise it for leaves that are not in `params` and for a state of another optimizer.
      TypeError: If a sharding has no mesh.

    Example:
      >>> import jax, jax.numpy as jnp, rmsprop_jax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from rmsprop_jax import sharding
      >>> mesh = jax.make_mesh((1,), ('data',))
      >>> params = jax.device_put({'kernel': jnp.ones((8, 8))}, NamedSharding(mesh, P()))
      >>> tx = sharding.zero1(rmsprop_jax.rmsprop(1e-3), params)
      >>> state = jax.jit(tx.init)(params)
      >>> state[0].nu['kernel'].sharding.spec[0]
      'data'
      >>> updates, state = jax.jit(tx.update)(params, state, params)

    Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models, arXiv:1910.02054, section 5.1; Xu et al., Automatic Cross-Replica Sharding of Weight
    Update in Data-Parallel Training, arXiv:2004.13336.
    """
    whole = by_path(_of_params(params, shardings))
    split = by_path(zero1_shardings(params, shardings, axis))
    inner = optax.with_extra_args_support(checked_transformation('tx', tx))

    def found(tree: Any, shardings: dict[KeyPath, NamedSharding]) -> Any:
        def leaf(path: KeyPath, _: Any) -> NamedSharding:
            if canonical(path) not in shardings:
                raise ValueError(f'params{keystr(path)} is not in the params given to zero1.')
            return shardings[canonical(path)]

        return tree_map_with_path(leaf, tree)

    def place(tree: Any, shardings: dict[KeyPath, NamedSharding]) -> Any:
        return jax.tree.map(_constrained, tree, found(tree, shardings))

    def place_state(state: Any, params: Any) -> Any:
        wanted = _of_state(tx, state, params, found(params, split))
        return jax.tree.map(_constrained, state, wanted)

    def init(params: optax.Params) -> Any:
        return place_state(inner.init(place(params, split)), params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        found(checked_updates(updates), split)
        start = jax.eval_shape(inner.init, updates)
        check_alike('state', state, 'tx.init(updates)', start)
        share, own = place(updates, split), place_state(state, updates)
        if params is not None:
            params = place(checked_params('zero1', updates, params), split)
        new, after = inner.update(share, own, params, **extra_args)
        return place(new, whole), place_state(after, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def offload(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of an optimizer in the host's memory between steps.

    ::

        state                 in pinned host memory
        update, new state  =  inner.update(gradients, state in device memory, params)
        new state             back in pinned host memory

    The numbers are those of `inner`. Statistics move; scalars such as counts stay on the device.
    This frees device memory between steps and while gradients are computed. During the update, the
    state, or the part of it that the compiler loads ahead, is on the device again. Each step moves
    the whole state over the host link twice. docs/scaling.md lists the bytes that compilers plan
    for; compact storage formats reduce them.

    Call `update` under `jax.jit` with `out_shardings` that place the state, and donate the
    parameters together with the state. Otherwise XLA may try to reuse a donated host buffer for an
    update on the device, and fail.

    Args:
      inner: The optimizer. Put `offload` around all of it: `offload(zero1(tx, params))`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state of `inner`. `state_shardings` and
      `abstract_state` return its shardings, in host memory.

    Raises:
      TypeError: If `inner` is not a transformation.
      NotImplementedError: If this version of JAX has no `jax.memory`.

    Example:
      >>> import jax, jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import sharding
      >>> tx = sharding.offload(rmsprop_jax.rmsprop(1e-3))
      >>> params = {'kernel': jnp.ones((8, 8))}
      >>> state = jax.jit(tx.init)(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> state[0].nu['kernel'].sharding.memory_kind, updates['kernel'].sharding.memory_kind
      ('pinned_host', 'device')

    Source: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857; `jax.memory` of JAX 0.10.
    """
    inner_ = optax.with_extra_args_support(checked_transformation('inner', inner))
    if not hasattr(jax, 'memory'):
        raise NotImplementedError(f'offload needs jax.memory, which JAX {jax.__version__} lacks.')

    def moved(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, space) if jnp.ndim(x) else x, state)

    def init(params: optax.Params) -> Any:
        return moved(inner_.init(params), jax.memory.Space.Host)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        state = moved(state, jax.memory.Space.Device)
        new, after = inner_.update(updates, state, params, **extra_args)
        return new, moved(after, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)


def reduce_scatter(gradients: Any, shardings: Any, axis: str | tuple[str, ...] = 'data') -> Any:
    """Sums gradients over the data axis and leaves each device its share, under `jax.shard_map`.

    It sums over one mesh axis after another. If each of these is one axis of a TPU's torus, the
    compiler emits reduce-scatters, which it does not for a group of devices along several axes; see
    docs/scaling.md.

    Args:
      gradients: The gradients of one device's share of the batch.
      shardings: The result of `zero1_shardings`, or its `PartitionSpec`s. Leaves that are not split
        over a data axis are summed but not scattered.
      axis: As for `zero1_shardings`.

    Returns:
      A tree like `gradients`. Return it from `shard_map` with `out_specs` from `shardings`.

    Raises:
      ValueError: If `jax.grad` has already summed a gradient, which it does under shard_map if
        parameters are the same on every device. Pass `check_vma=False` to shard_map, or
        `jax.lax.pcast(params, axis, to='varying')` to `jax.grad`.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> from rmsprop_jax import sharding
      >>> mesh = jax.make_mesh((1,), ('data',))
      >>> split = functools.partial(sharding.reduce_scatter, shardings={'w': P('data')})
      >>> mapped = jax.shard_map(
      ...     split, mesh=mesh, in_specs=P(), out_specs={'w': P('data')}, check_vma=False
      ... )
      >>> print(mapped({'w': jnp.ones(4)})['w'])
      [1. 1. 1. 1.]
    """
    names = _checked_axis(axis)

    for name in names:
        _check_is_mapped(name)

    def leaf(path: KeyPath, g: jax.Array, sharding: Any) -> jax.Array:
        for name in names:
            if name in varying_axes(lax.axis_index(name)) - varying_axes(g):
                raise ValueError(
                    f'gradients{keystr(path)} is already summed over {name!r}: pass '
                    'check_vma=False to jax.shard_map, or apply jax.lax.pcast to the parameters '
                    'before jax.grad.'
                )
        entries = enumerate(map(axis_names, _spec(sharding)))
        owners = [(name, dim) for dim, entry in entries for name in entry if name in names]
        for name, dim in owners:
            g = lax.psum_scatter(g, name, scatter_dimension=dim, tiled=True)
        rest = tuple(name for name in names if name not in dict(owners))
        return lax.psum(g, rest) if rest else g

    return tree_map_with_path(leaf, gradients, _of_params(gradients, shardings, 'gradients'))


def _of_params(params: Any, shardings: Any, name: str = 'params') -> Any:
    """The sharding of each parameter."""
    checked_leaves(name, params)
    if shardings is not None:
        whole = broadcast_prefix('shardings', shardings, params)
        for path, sharding in tree_flatten_with_path(whole)[0]:
            if not isinstance(sharding, Sharding | PartitionSpec):
                raise TypeError(
                    f'shardings{keystr(path)} must be a sharding or a PartitionSpec, got '
                    f'{sharding!r}.'
                )
        return whole

    def leaf(path: KeyPath, param: Any) -> Any:
        found = getattr(param, 'sharding', None)
        if found is None:
            raise ValueError(f'{name}{keystr(path)} has no sharding: pass shardings.')
        return found

    return tree_map_with_path(leaf, params)


def _checked_axis(axis: Any) -> tuple[str, ...]:
    names = axis_names(axis) if isinstance(axis, str | Sequence) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f'axis must be the name of a mesh axis, or several, got {axis!r}.')
    return names


def _check_is_mapped(name: str) -> None:
    try:
        lax.axis_index(name)
    except NameError:
        raise ValueError(f'axis {name!r} is not an axis that jax.shard_map maps here.') from None


def _of_state(tx: Any, state: Any, params: Any, shardings: Any) -> Any:
    """The shardings of a state. Only its shapes are inspected."""
    elsewhere = _replicated(shardings)

    def leaf(param: Any, stored: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda part: _like_param(part, param, sharding, elsewhere),
            stored,
            is_leaf=lambda part: isinstance(part, Means),
        )

    return optax.tree.map_params(
        tx,
        lambda moments, params, shardings: map_with_moments(leaf, params, moments, shardings),
        state,
        params,
        shardings,
        transform_non_params=lambda _: elsewhere,
        # Pass whole trees, since a leaf may be stored as several, or masked out.
        is_leaf=lambda _: True,
    )


def _like_param(stored: Any, param: Any, sharding: Any, elsewhere: Any) -> Any:
    if isinstance(stored, Means):
        specs = factored().spec(_spec(sharding), len(param.shape))
        return type(stored)(*[_with_spec(sharding, spec) for spec in specs])
    # Complex parameters may be stored as pairs of reals, along a last axis.
    is_alike = stored.shape[: len(param.shape)] == param.shape
    return sharding if is_alike else elsewhere


def _spec(sharding: Any) -> PartitionSpec:
    if isinstance(sharding, NamedSharding):
        return sharding.spec
    return sharding if isinstance(sharding, PartitionSpec) else PartitionSpec()


def _with_spec(sharding: Any, spec: PartitionSpec) -> Any:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return spec if isinstance(sharding, PartitionSpec) else sharding


def _split(shape: tuple[int, ...], sharding: NamedSharding, names: tuple[str, ...]) -> Any:
    """The spec with `names` added; unchanged if it contains one of them or no axis fits."""
    sizes, spec = sharding.mesh.shape, sharding.spec
    entries = [axis_names(spec[dim]) if dim < len(spec) else () for dim in range(len(shape))]
    if set(names) & {name for entry in entries for name in entry}:
        return spec
    parts = math.prod(sizes[name] for name in names)
    # Try unsharded axes first.
    for dim in sorted(range(len(shape)), key=lambda dim: bool(entries[dim])):
        own = math.prod(sizes[name] for name in entries[dim])
        if shape[dim] and shape[dim] % (own * parts) == 0:
            entries[dim] += names
            return PartitionSpec(
                *[tuple(e) if len(e) > 1 else next(iter(e), None) for e in entries]
            )
    return spec


def _constrained(x: Any, sharding: Any) -> Any:
    """`x` with this sharding; an abstract parameter only records it."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(sharding=sharding)
    if not isinstance(sharding, NamedSharding):
        return x
    if AxisType.Explicit in sharding.mesh.axis_types:
        return reshard(x, sharding)
    return lax.with_sharding_constraint(x, sharding)


def _replicated(shardings: Any) -> Any:
    """The sharding of leaves that belong to no parameter: replicated, in device memory."""
    first = next(iter(jax.tree.leaves(shardings)), PartitionSpec())
    if isinstance(first, NamedSharding):
        return NamedSharding(first.mesh, PartitionSpec())
    return PartitionSpec() if isinstance(first, PartitionSpec) else first
