"""TensorFlow 1: the slots of `tf.compat.v1.train.RMSPropOptimizer`, as checkpoints name them.

A checkpoint holds the slots beside the variables, under names that only their order explains:
`dense/kernel/RMSProp` is `rms`, then `..._1` and so on are `mg` (where centered) and `momentum`::

    reader = tf.train.load_checkpoint(path)
    variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}

The layers' pairs are those of `interchange.keras`, whose axes and names TensorFlow shares.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import optax

from rmsprop_jax._checks import checked_flag, checked_transformation
from rmsprop_jax.interchange._counterpart import Counterpart, Exchange
from rmsprop_jax.interchange._mapping import (
    EntryError,
    Pair,
    as_count,
    checked_count,
    checked_names,
)
from rmsprop_jax.interchange._measure import Trial
from rmsprop_jax.interchange._state import Moments, described

__all__ = ['from_tensorflow', 'to_tensorflow']
__dir__ = __all__.copy

_SLOTS = {'nu': 'rms', 'mu': 'mg', 'trace': 'momentum'}
_STEP = 'global_step'


def from_tensorflow(
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: Any,
    mapping: Iterable[Pair],
    *,
    centered: bool = False,
    name: str | None = 'RMSProp',
    count: int | None = None,
) -> Any:
    """The state of `tx` that goes on where TensorFlow's optimizer stopped.

    Args:
      variables: A checkpoint's arrays by name. What is not named as one of this optimizer's slots
        (the variables themselves, another optimizer's slots) is not its state and is left alone.
      tx: `dialects.tensorflow(...)` with the optimizer's settings, inside whatever wrappers.
      params: Our parameters.
      mapping: The pairs; `theirs` is the variable's name, `dense/kernel`.
      centered: Whether the optimizer is, which decides what the numbered slots are.
      name: The optimizer's name. None for slots named after what they are, as `get_slot` does:
        `dense/kernel/rms`, `dense/kernel/mg`, `dense/kernel/momentum`.
      count: The step count for schedules; `global_step` among the variables if not given.

    Returns:
      A state like `tx.init(params)`. The `trace` of `dialects.tensorflow` is the negative of the
      slot `momentum`.

    Raises:
      InterchangeError: Listing every slot that is missing, left over, misshapen, of the wrong kind
        or not finite, and every velocity that is on the other side of a learning rate that changes.

    Warns:
      LossyExchangeWarning: Where a centered second moment is smaller than its squared mean.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rmsprop_jax import dialects, interchange
      >>> theirs = {'w': np.zeros(2, 'f'), 'w/RMSProp': np.ones(2, 'f'),
      ...           'w/RMSProp_1': np.full(2, 0.5, 'f'), 'global_step': np.int64(7)}
      >>> state = interchange.from_tensorflow(
      ...     theirs, dialects.tensorflow(0.1), jnp.zeros(2), [interchange.Pair('w', '')])
      >>> state[2].trace
      Array([-0.5, -0.5], dtype=float32)

    Source: TensorFlow 2.21, tensorflow/python/training/rmsprop.py and slot_creator.py.
    """
    exchange = Exchange('the TensorFlow slots cannot be converted', params, mapping)
    checked_transformation('tx', tx)
    checked_names('variables', variables)
    means = exchange.by_path if checked_flag('centered', centered) else ()
    count = as_count(variables.get(_STEP)) if count is None else checked_count(count)
    if count is None:
        exchange.add(f'{_STEP!r} is missing or no step count: pass count')
    exchange.counterparts = _counterparts(exchange, name, means)
    slots = {entry: value for entry, value in variables.items() if _is_slot(entry, name)}
    theirs = exchange.collected(slots, [count or 0])

    def describe(moment: str, path: str) -> str:
        slot = _SLOTS.get(moment, moment)
        counterpart = exchange.counterparts.get(path)
        if counterpart is None or moment not in counterpart.names:
            return described(slot, path)
        return f'{counterpart.names[moment]!r} ({slot})'

    exchange.counterparts = _with_epsilon(exchange.counterparts, theirs)
    return exchange.adopted(theirs, Trial(tx, tx.init(params), params), describe)


def _counterparts(
    exchange: Exchange, name: str | None, centered: Collection[str]
) -> dict[str, Counterpart]:
    """The counterparts, of which those at the `centered` paths have a mean."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be the optimizer's name or None, got {name!r}.")

    def names(path: str, variable: str) -> dict[str, str]:
        moments = [moment for moment in _SLOTS if moment != 'mu' or path in centered]
        if name is None:
            return {moment: f'{variable}/{_SLOTS[moment]}' for moment in moments}
        numbers = ['', '_1', '_2']
        return {m: f'{variable}/{name}{i}' for m, i in zip(moments, numbers, strict=False)}

    pairs = exchange.by_path
    return {path: Counterpart('TensorFlow', names(path, pairs[path].theirs)) for path in pairs}


def _with_epsilon(
    counterparts: Mapping[str, Counterpart], moments: Moments
) -> dict[str, Counterpart]:
    """Without momentum, OptimizerV2 has epsilon outside the root, and no slot `momentum`."""
    return {
        path: dataclasses.replace(theirs, eps_in_sqrt=path in moments.columns['trace'])
        for path, theirs in counterparts.items()
    }


def _is_slot(entry: str, name: str | None) -> bool:
    last = '|'.join(_SLOTS.values()) if name is None else re.escape(name) + r'(_\d+)?'
    return re.fullmatch(f'(.*/)?({last})', entry, re.DOTALL) is not None


def to_tensorflow(
    state: Any,
    params: Any,
    mapping: Iterable[Pair],
    *,
    tx: optax.GradientTransformation | None = None,
    name: str | None = 'RMSProp',
) -> dict[str, np.ndarray]:
    """The slots of a TensorFlow optimizer that goes on where our state stopped, and `global_step`.

    Args:
      state: The state of our transformation.
      params: Our parameters.
      mapping: The pairs.
      tx: The transformation whose state it is, which has a velocity.
      name: As for `from_tensorflow`.

    Raises:
      InterchangeError: Listing every moment without a pair, a companion or a counterpart there.
        TensorFlow always has a `momentum`, as has `dialects.tensorflow`. Likewise every velocity
        that is on the other side of a learning rate that changes.
    """
    exchange = Exchange('the state cannot be written for TensorFlow', params, mapping)
    moments, trial = exchange.our_moments('TensorFlow', tx, state)
    for path in sorted(moments.columns['nu'].keys() ^ moments.columns['trace'].keys()):
        exchange.add(f'{path!r} has not both a nu and a trace, and TensorFlow has')
    counterparts = _counterparts(exchange, name, moments.columns['mu'])
    exchange.counterparts = _with_epsilon(counterparts, moments)

    def adapt(moment: str, path: str, array: np.ndarray) -> np.ndarray:
        if path not in counterparts or moment not in _SLOTS:
            raise EntryError(f'{described(moment, path)} has no counterpart there')
        return array

    slots = exchange.released(moments, trial, adapt)
    exchange.raise_if_any()
    return {_STEP: np.array(moments.count, np.int64), **slots}
