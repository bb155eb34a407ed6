"""`reset`: fresh statistics for parameters that have been initialised anew, or have broken ones."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

from rmsprop_jax._checks import (
    broadcast_prefix,
    check_alike,
    checked_flag,
    checked_transformation,
    is_function,
)
from rmsprop_jax._core.leaves import widen
from rmsprop_jax._core.wrapped import (
    check_storage_is_given,
    like_state,
    map_rms_states,
    map_with_moments,
    rms_states,
    select,
)
from rmsprop_jax._transforms import AverageState
from rmsprop_jax._types import RmsState
from rmsprop_jax.storage._choice import Storage, check_storage
from rmsprop_jax.storage._convert import convert, read
from rmsprop_jax.storage._place import unshared


def reset(
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    mask: Any,
    storage: Storage | None = None,
) -> Any:
    """Gives the statistics of some parameters the values `tx.init` starts with.

    For layers that are initialised anew while the rest trains on: their old second moment would
    scale the steps, and their old velocity would push, as if nothing had happened. Everything that
    `tx` keeps for a selected parameter starts again, through chains, `optax.masked`,
    `optax.partition` and other wrappers. Step counts, and thus schedules, go on.

    The transformation is asked for because the start value of a second moment, `initial_scale`, is
    nowhere in the state.

    Args:
      tx: The transformation that `state` belongs to.
      state: Its state.
      params: The parameters, after they have been initialised anew: an average of parameters, which
        `dialects.keras(use_ema=True)` keeps, starts from them.
      mask: What starts again: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. In the place of a boolean there may be an array of
        them, traced or not, of shape () or that of the parameter, which selects single entries.
      storage: What `tx` was given, where its statistics are kept in formats that round.

    Returns:
      The new state; the old one is unchanged.

    A bias-corrected state has one sum of weights for all parameters that share it. It starts again
    if they all do. If only some do, their averages are divided by the old sum, which is an
    uncorrected start: the first step is up to `1 / sqrt(1 - decay)` learning rates long.

    Raises:
      TypeError: For a mask with leaves that are not booleans, or a `tx` that is none.
      ValueError: For a mask that is no prefix of the parameters, a state that is not of `tx`, a
        missing `storage`, or single entries of what is `factored`.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> tx = rmsprop_jax.rmsprop(0.1, initial_scale=1.0)
      >>> params = {'body': jnp.ones(2), 'head': jnp.ones(2)}
      >>> _, state = tx.update(params, tx.init(params))
      >>> state = rmsprop_jax.reset(tx, state, params, {'body': False, 'head': True})
      >>> state[0].nu['head'], state[0].count
      (Array([1., 1.], dtype=float32), Array(1, dtype=int32))
    """
    checked_transformation('tx', tx)
    check_storage(storage)
    chosen = _chosen(params, mask)
    start = fresh(tx, params)
    check_alike('state', state, 'tx.init(params)', start)
    start = in_units_of(state, start, params, storage)
    marks = map_rms_states(with_weight, like_state(tx, state, chosen, False))
    return unshared(jax.tree.map(select, marks, start, state), state, params)


def _chosen(params: Any, mask: Any) -> Any:
    given = mask(params) if is_function(mask) else mask
    for path, value in tree_flatten_with_path(given)[0]:
        if not hasattr(value, 'dtype') or value.dtype.kind != 'b':
            checked_flag(f'mask{keystr(path)}', value)

    def leaf(path: tuple[Any, ...], value: Any, param: Any) -> Any:
        if jnp.shape(value) not in ((), jnp.shape(param)):
            raise ValueError(
                f'mask{keystr(path)} has shape {jnp.shape(value)}, but its parameter '
                f'{jnp.shape(param)}.'
            )
        return bool(value) if isinstance(value, bool | np.bool_) else value

    return tree_map_with_path(leaf, broadcast_prefix('mask', given, params), params)


def with_weight(node: RmsState) -> RmsState:
    """Marks of what starts again, of which that of the sum of weights follows from the others."""
    if node.weight is None:
        return node
    marks = [mark if isinstance(mark, bool) else mark.all() for mark in jax.tree.leaves(node[1:4])]
    return node._replace(weight=functools.reduce(operator.and_, marks, True))


def in_units_of(running: Any, start: Any, params: Any, storage: Storage | None) -> Any:
    """`start`, with its statistics as multiples of the units that those of `running` have."""
    if all(node.unit is None for node in rms_states(running)):
        return start
    check_storage_is_given(running, storage)
    return encoded(read(start, storage), running, params, storage)


def encoded(decoded: Any, running: Any, params: Any, storage: Storage | None) -> Any:
    """A decoded state in the formats of `storage`, in the units of the running state."""
    in_units = map_rms_states(lambda node, other: node._replace(unit=other.unit), decoded, running)
    return convert(in_units, params, None, storage)


def fresh(tx: optax.GradientTransformation, params: Any) -> Any:
    """What `tx.init` makes, with averages of parameters that start from them."""

    def is_average(node: Any) -> bool:
        return isinstance(node, AverageState)

    def leaf(node: Any) -> Any:
        if not is_average(node):
            return node
        ema = map_with_moments(lambda p, _: p, widen(params), node.ema)
        return node._replace(ema=ema)

    return jax.tree.map(leaf, tx.init(params), is_leaf=is_average)
