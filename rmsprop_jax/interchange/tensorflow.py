"""TensorFlow 1: the slots of `tf.compat.v1.train.RMSPropOptimizer`, as checkpoints name them.

A checkpoint holds the slots beside the variables, under names that only their order explains:
`dense/kernel/RMSProp` is `rms`, then `..._1` and so on are `mg` (where centered) and `momentum`::

    reader = tf.train.load_checkpoint(path)
    variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}

The layers' pairs are those of `interchange.keras`, whose axes and names TensorFlow shares.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import optax

from rmsprop_jax._checks import checked_flag, checked_transformation
from rmsprop_jax.interchange._mapping import (
    Pair,
    Problems,
    as_count,
    checked_count,
    checked_names,
    laid_out,
    paired,
)
from rmsprop_jax.interchange._sides import Claim, checked_source, settle
from rmsprop_jax.interchange._state import Columns, collect, read
from rmsprop_jax.interchange._write import Writer

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
      LossyConversionWarning: Where a centered second moment is smaller than its squared mean.

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
    problems = Problems('the TensorFlow slots cannot be converted')
    checked_transformation('tx', tx)
    checked_names('variables', variables)
    _check_name(name)
    centered = checked_flag('centered', centered)
    count = None if count is None else checked_count(count)
    pairs, _ = paired(mapping, params, problems)
    slots = {
        _slot(pair.theirs, moment, centered, name): (moment, pair)
        for pair in pairs.values()
        for moment in _SLOTS
        if centered or moment != 'mu'
    }
    columns: Columns = {moment: {} for moment in (*_SLOTS, 'ema')}
    for entry, value in variables.items():
        if entry not in slots:
            if _is_slot(entry, name):
                problems.add(f'{entry!r} belongs to no pair')
            continue
        moment, pair = slots[entry]
        collect(columns, moment, pair, repr(entry), value, problems)
    if count is None:
        count = as_count(variables.get(_STEP))
        if count is None:
            problems.add(f'{_STEP!r} is missing or no step count: pass count')

    def describe(moment: str, path: str) -> str:
        if path not in pairs or (moment == 'mu' and not centered):
            return f'{_SLOTS.get(moment, moment)} of {path!r}'
        entry = _slot(pairs[path].theirs, moment, centered, name)
        return f'{entry!r} ({_SLOTS.get(moment, moment)})'

    start, claims = tx.init(params), _claims(pairs, columns['trace'])
    settle(tx, start, params, count or 0, claims, columns['trace'], problems, to_ours=True)
    return Writer(columns, describe, problems).write(start, count or 0)


def _claims(pairs: Mapping[str, Pair], velocities: Mapping[str, Any]) -> dict[str, Claim]:
    """Without momentum, OptimizerV2 has epsilon outside the root, and no slot `momentum`."""
    return {
        path: Claim('TensorFlow', inside=True, eps_in_sqrt=path in velocities) for path in pairs
    }


def _check_name(name: Any) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be the optimizer's name or None, got {name!r}.")


def _slot(variable: str, moment: str, centered: bool, name: str | None) -> str:
    if name is None:
        return f'{variable}/{_SLOTS.get(moment, moment)}'
    order = ['nu', 'mu', 'trace'] if centered else ['nu', 'trace']
    number = order.index(moment) if moment in order else len(order)
    return f'{variable}/{name}' + (f'_{number}' if number else '')


def _is_slot(entry: str, name: str | None) -> bool:
    last = entry.rpartition('/')[2]
    if name is None:
        return last in _SLOTS.values()
    head, _, number = last.rpartition('_')
    return last == name or (head == name and number.isdigit())


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
    problems = Problems('the state cannot be written for TensorFlow')
    _check_name(name)
    pairs, _ = paired(mapping, params, problems)
    moments = read(state, problems)
    if len(moments.counts) != 1:
        problems.add(f'the state has step counts {sorted(moments.counts)}, and TensorFlow has one')
    for path in sorted(moments.weights):
        problems.add(f'{path!r} is bias-corrected, which TensorFlow has not')
    for path in sorted(moments.columns['nu'].keys() ^ moments.columns['trace'].keys()):
        problems.add(f'{path!r} has not both a nu and a trace, and TensorFlow has')
    count, velocities = max(moments.counts, default=0), moments.columns['trace']
    tx = checked_source('tx', tx, velocities, problems)
    if tx is not None:
        claims = _claims(pairs, velocities)
        settle(tx, state, params, count, claims, velocities, problems, to_ours=False)
    slots: dict[str, np.ndarray] = {_STEP: np.array(count, np.int64)}
    for moment, column in moments.columns.items():
        for path, array in column.items():
            if path not in pairs or moment not in _SLOTS:
                problems.add(f'{moment} of {path!r} has no counterpart there')
                continue
            centered = path in moments.columns['mu']
            turned = laid_out(path, pairs[path].layout.to_theirs, array, problems)
            if turned is not None:
                entry = _slot(pairs[path].theirs, moment, centered, name)
                slots[entry] = np.array(turned, order='C')
    problems.raise_if_any()
    return slots
