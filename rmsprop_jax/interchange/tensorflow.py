"""TensorFlow 1: the slots of `tf.compat.v1.train.RMSPropOptimizer`, as checkpoints name them.

A checkpoint contains the slots next to the variables and numbers them in order:
`dense/kernel/RMSProp` is `rms`; `..._1` and so on are `mg` (if centered) and `momentum`::

    reader = tf.train.load_checkpoint(path)
    variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}

Make the pairs of layers with `interchange.keras`: axes and names are the same in TensorFlow.

The optimizers of `tf_keras.optimizers.legacy`, which are those of Keras in TensorFlow 2.0 to 2.10,
have the same slots. Ask for them by `get_slot`, pass `name=None` and the count, and let
`dialects.keras_legacy` go on::

    named = {v.name.removesuffix(':0'): v for v in model.trainable_variables}
    slots = {
        f'{name}/{slot}': optimizer.get_slot(v, slot).numpy()
        for name, v in named.items()
        for slot in optimizer.get_slot_names()
    }
    state = from_tensorflow(slots, tx, params, pairs, name=None, count=int(optimizer.iterations))
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
    """The state with which `tx` continues where TensorFlow's optimizer stopped.

    Args:
      variables: The arrays of a checkpoint by name. Arrays that are not named like slots of this
        optimizer (the variables themselves, slots of another optimizer) are ignored.
      tx: `dialects.tensorflow(...)` with the optimizer's settings, inside any wrappers.
      params: Our parameters.
      mapping: The pairs; `theirs` is the name of the variable, such as `dense/kernel`.
      centered: Whether the optimizer is centered, which decides what the numbered slots mean.
      name: The optimizer's name. None for slots with the names that `get_slot` uses:
        `dense/kernel/rms`, `dense/kernel/mg`, `dense/kernel/momentum`.
      count: The step count for schedules. Defaults to `global_step` in `variables`.

    Returns:
      A state like `tx.init(params)`. The `trace` of `dialects.tensorflow` is the negative of the
      slot `momentum`.

    Raises:
      InterchangeError: Listing every slot that is missing, left over, misshapen, of the wrong kind
        or not finite, and every velocity on the other side of a learning rate that changes.

    Warns:
      LossyConversionWarning: If a centered second moment is smaller than its squared mean.

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
        exchange.add(f'{_STEP!r} is missing or not a step count: pass count')
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
    """The counterparts by path. Those at the `centered` paths have a mean."""
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
    """Sets where epsilon is. OptimizerV2 without momentum has it outside the root, and no slot
    `momentum`."""
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
    """The slots, and `global_step`, with which TensorFlow's optimizer continues from our state.

    Args:
      state: The state of our transformation.
      params: Our parameters.
      mapping: The pairs.
      tx: The transformation that `state` belongs to; needed, since the state has a velocity.
      name: As for `from_tensorflow`.

    Raises:
      InterchangeError: Listing every moment without a pair or a counterpart in TensorFlow, every
        parameter that has only one of `nu` and `trace` (TensorFlow 1 always has a `momentum`, as
        does `dialects.tensorflow`; with `name=None` a `nu` alone is accepted), and every velocity
        on the other side of a learning rate that changes.
    """
    exchange = Exchange('the state cannot be written for TensorFlow', params, mapping)
    moments, trial = exchange.our_moments('TensorFlow', tx, state)
    nu, trace = (moments.columns[moment].keys() for moment in ('nu', 'trace'))
    # Keras's optimizer without momentum has no such slot, and names slots as get_slot does.
    for path in sorted(nu ^ trace if name is not None else trace - nu):
        exchange.add(f'{path!r} lacks a nu or a trace, but TensorFlow has both')
    counterparts = _counterparts(exchange, name, moments.columns['mu'])
    exchange.counterparts = _with_epsilon(counterparts, moments)

    def adapt(moment: str, path: str, array: np.ndarray) -> np.ndarray:
        if path not in counterparts or moment not in _SLOTS:
            raise EntryError(f'{described(moment, path)} has no counterpart in TensorFlow')
        return array

    slots = exchange.released(moments, trial, adapt)
    exchange.raise_if_any()
    return {_STEP: np.array(moments.count, np.int64), **slots}
