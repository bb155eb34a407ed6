"""`reset`: fresh statistics for parameters that were reinitialised or whose statistics broke."""

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
    """Resets the statistics of selected parameters to the values of `tx.init`.

    Use it for layers that are reinitialised while the rest keeps training. Otherwise their old
    second moment would still scale the steps, and their old velocity would still push. Everything
    that `tx` stores for a selected parameter is reset, through chains, `optax.masked`,
    `optax.partition` and other wrappers. Step counts, and thus schedules, continue.

    `tx` is needed because the state does not contain `initial_scale`, the start value of a second
    moment.

    Args:
      tx: The transformation that `state` belongs to.
      state: Its state.
      params: The parameters after they were reinitialised: the average of parameters that
        `dialects.keras(use_ema=True)` keeps restarts from them.
      mask: Which parameters to reset: a tree of booleans like the parameters, a prefix of one, or a
        function from the parameters to one. A boolean may be an array, traced or not, of shape ()
        or of the parameter's shape; the latter selects single entries.
      storage: The `storage` of `tx`, if its statistics use formats that round.

    Returns:
      The new state; the old one is unchanged.

    A bias-corrected state has one sum of weights for all parameters that share it. The sum is reset
    only if all of them are. If only some are, their averages are divided by the old sum, so their
    start is uncorrected: the first step is up to `1 / sqrt(1 - decay)` learning rates long.

    Raises:
      TypeError: If `tx` is not a transformation, or a leaf of the mask is not a boolean.
      ValueError: If the mask is not a prefix of the parameters, the state does not belong to `tx`,
        `storage` is missing, or the mask selects single entries of a `factored` statistic.

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
                f'mask{keystr(path)} has shape {jnp.shape(value)}, but its parameter has shape '
                f'{jnp.shape(param)}.'
            )
        return bool(value) if isinstance(value, bool | np.bool_) else value

    return tree_map_with_path(leaf, broadcast_prefix('mask', given, params), params)


def with_weight(node: RmsState) -> RmsState:
    """Adds the mark of the sum of weights: it is reset if all other statistics are."""
    if node.weight is None:
        return node
    marks = [mark if isinstance(mark, bool) else mark.all() for mark in jax.tree.leaves(node[1:4])]
    return node._replace(weight=functools.reduce(operator.and_, marks, True))


def in_units_of(running: Any, start: Any, params: Any, storage: Storage | None) -> Any:
    """`start`, with its statistics in the units of those of `running`."""
    if all(node.unit is None for node in rms_states(running)):
        return start
    check_storage_is_given(running, storage)
    return encoded(read(start, storage), running, params, storage)


def encoded(decoded: Any, running: Any, params: Any, storage: Storage | None) -> Any:
    """Encodes a decoded state in the formats of `storage`, in the units of the running state."""
    in_units = map_rms_states(lambda node, other: node._replace(unit=other.unit), decoded, running)
    return convert(in_units, params, None, storage)


def fresh(tx: optax.GradientTransformation, params: Any) -> Any:
    """The state of `tx.init`, with averages of parameters that start from `params`."""

    def restarted(node: Any) -> Any:
        if not isinstance(node, AverageState):
            return node
        ema = map_with_moments(lambda p, _: p, widen(params), node.ema)
        return node._replace(ema=ema)

    start = tx.init(params)
    return jax.tree.map(restarted, start, is_leaf=lambda node: isinstance(node, AverageState))
