"""Where optimizer state lives on a mesh: sharded like the parameters, or over the data axis too.

JAX's own SPMD engine does the work. Here is what it cannot know: which array of a state belongs to
which parameter, and along which axes. See docs/scaling.md.
"""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_map_with_path

from rmsprop_jax.storage._formats import Factors, factored


def state_shardings(tx: Any, params: Any, shardings: Any = None) -> Any:
    """The shardings of all that an optimizer keeps, from those of the parameters.

    Statistics are sharded and placed like their parameter, in every storage format; rows and
    columns of factored ones are without the axis they do not have. Scalars, and whatever else is
    not shaped like a parameter, are replicated.

    Args:
      tx: The optimizer: any gradient transformation, with chains, masks, partitions and wrappers.
      params: The parameters, or their shapes: arrays or `jax.ShapeDtypeStruct`s, also within the
        variables of `flax.nnx`.
      shardings: Their shardings, a tree like `params` or a prefix of it, of `NamedSharding`s or
        `PartitionSpec`s. None means those that `params` have.

    Returns:
      A tree like `tx.init(params)`, for `jit(out_shardings=...)`, of what `shardings` is made of:
      `PartitionSpec`s come back as such, for `jax.shard_map(in_specs=...)`.

    Raises:
      ValueError: If `shardings` is None and a parameter has no sharding.

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
    shardings = _of_params(params, shardings)
    state = jax.eval_shape(tx.init, params)
    elsewhere = _replicated(shardings)
    return optax.tree.map_params(
        tx,
        lambda moments, params, shardings: _like_params(moments, params, shardings, elsewhere),
        state,
        params,
        shardings,
        transform_non_params=lambda _: elsewhere,
        # Whole trees are handed over, so that a leaf may be kept as several, or masked out.
        is_leaf=lambda _: True,
    )


def abstract_state(tx: Any, params: Any, shardings: Any = None) -> Any:
    """Shapes, dtypes and shardings of the state that `tx.init` would make, without making it.

    It is what Orbax restores into, on whatever mesh the parameters are by now.

    Args:
      tx: As for `state_shardings`.
      params: As for `state_shardings`.
      shardings: As for `state_shardings`; of `NamedSharding`s.

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
    state = jax.eval_shape(tx.init, params)
    return jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding),
        state,
        state_shardings(tx, params, shardings),
    )


def _of_params(params: Any, shardings: Any) -> Any:
    """The sharding of each parameter."""
    if shardings is not None:
        return jax.tree.broadcast(shardings, params)

    def leaf(path: tuple[Any, ...], param: Any) -> Any:
        found = getattr(param, 'sharding', None)
        if found is None:
            raise ValueError(f'params{keystr(path)} has no sharding: give shardings.')
        return found

    return tree_map_with_path(leaf, params)


def _like_params(moments: Any, params: Any, shardings: Any, elsewhere: Any) -> Any:
    """The shardings of one tree of a state that has the structure of the parameters."""

    def leaf(param: Any, sharding: Any, stored: Any) -> Any:
        return jax.tree.map(
            lambda part: _like_param(part, param, sharding, elsewhere),
            stored,
            is_leaf=lambda part: isinstance(part, Factors),
        )

    return jax.tree.map(leaf, params, shardings, moments)


def _like_param(stored: Any, param: Any, sharding: Any, elsewhere: Any) -> Any:
    if isinstance(stored, Factors):
        specs = factored().spec(_spec(sharding), stored.row.ndim + 1)
        return jax.tree.map(lambda spec: _with_spec(sharding, spec), specs)
    # Complex parameters may be kept as pairs of reals, along a further axis.
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


def _replicated(shardings: Any) -> Any:
    """For what belongs to no parameter: in the devices' own memory."""
    first = next(iter(jax.tree.leaves(shardings)), PartitionSpec())
    if isinstance(first, NamedSharding):
        return NamedSharding(first.mesh, PartitionSpec())
    return PartitionSpec() if isinstance(first, PartitionSpec) else first
