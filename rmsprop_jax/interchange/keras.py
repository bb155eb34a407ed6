"""Keras 3: the variables of `keras.optimizers.RMSprop`.

Collect them by name, and put them back the same way::

    variables = {v.name: v.numpy() for v in optimizer.variables}
    for v in optimizer.variables:
        v.assign(converted[v.name])

Keras names a slot after the path of its variable, `sequential/dense/kernel`, with underscores:
`sequential_dense_kernel_velocity`. Pairs have that path as `theirs`; `v.path` of the optimizer's
variables, which starts with the optimizer's own name, is understood too.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import optax

from rmsprop_jax._checks import checked_steps, checked_transformation
from rmsprop_jax._types import constant
from rmsprop_jax.interchange._mapping import (
    AS_IS,
    Layout,
    Pair,
    Problems,
    as_array,
    as_count,
    as_number,
    checked_names,
    laid_out,
    layer,
    paired,
)
from rmsprop_jax.interchange._measure import Trial, accumulates
from rmsprop_jax.interchange._sides import Claim, checked_source, settle
from rmsprop_jax.interchange._state import (
    Columns,
    collect,
    injected,
    read,
    with_injected,
)
from rmsprop_jax.interchange._write import Writer

__all__ = ['dense', 'from_keras', 'norm', 'to_keras']
__dir__ = __all__.copy

_SLOTS = {'nu': 'velocity', 'mu': 'average_gradient', 'trace': 'momentum', 'ema': 'average'}
_ACCUMULATOR = 'gradient_accumulator'


def dense(
    theirs: str, ours: str | tuple[Any, ...], *, bias: bool = True, layout: Layout = AS_IS
) -> tuple[Pair, ...]:
    """The pairs of Keras's `Dense` or `Conv` with Flax's: the axes lie alike.

    Example:
      >>> from rmsprop_jax import interchange
      >>> [(pair.theirs, pair.ours) for pair in interchange.keras.dense('net/dense', 'Dense_0')]
      [('net/dense/kernel', 'Dense_0/kernel'), ('net/dense/bias', 'Dense_0/bias')]
    """
    return layer(theirs, ours, ('/kernel', 'kernel'), ('/bias', 'bias'), bias, layout)


conv = dense


def norm(theirs: str, ours: str | tuple[Any, ...], *, bias: bool = True) -> tuple[Pair, ...]:
    """The pairs of Keras's normalisation layers with Flax's: `gamma` is `scale`."""
    return layer(theirs, ours, ('/gamma', 'scale'), ('/beta', 'bias'), bias)


def from_keras(
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: Any,
    mapping: Iterable[Pair],
    *,
    gradient_accumulation_steps: int | None = None,
) -> Any:
    """The state of `tx` that goes on where Keras's optimizer stopped.

    Args:
      variables: The optimizer's variables by name.
      tx: `dialects.keras(...)` with the optimizer's settings, inside whatever wrappers.
      params: Our parameters.
      mapping: The pairs.
      gradient_accumulation_steps: As the optimizer has it, if it is to be compared with what `tx`
        does, which is what counts. Keras's `iteration` counts calls, of which so many make a step;
        between them there is nothing to convert to.

    Returns:
      A state like `tx.init(params)`. The `trace` of `dialects.keras` is the negative of Keras's
      `momentum`. The variable `learning_rate` goes where `inject_hyperparams` holds one; otherwise
      make `tx` with it: `dialects.keras(float(variables['learning_rate']))`.

    Raises:
      InterchangeError: Listing every entry that is missing, left over, misshapen, of the wrong kind
        or not finite, a `learning_rate` or a number of accumulated calls that `tx` contradicts, and
        every velocity that is on the other side of a learning rate that changes.

    Warns:
      LossyConversionWarning: Where a centered second moment is smaller than its squared mean.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from rmsprop_jax import dialects, interchange
      >>> params = {'kernel': jnp.zeros(2)}
      >>> theirs = {'iteration': np.int64(7), 'learning_rate': np.float32(0.1),
      ...           'dense_kernel_velocity': np.ones(2, 'f'),
      ...           'dense_kernel_momentum': np.ones(2, 'f')}
      >>> tx = dialects.keras(0.1, momentum=0.9)
      >>> pairs = [interchange.Pair('dense/kernel', 'kernel')]
      >>> state = interchange.from_keras(theirs, tx, params, pairs)
      >>> optax.tree.get(state, 'trace')['kernel']
      Array([-1., -1.], dtype=float32)

    Source: Keras 3.15, keras/src/optimizers/base_optimizer.py and rmsprop.py.
    """
    problems = Problems('the Keras variables cannot be converted')
    checked_transformation('tx', tx)
    checked_names('variables', variables)
    every = _checked_steps(gradient_accumulation_steps)
    pairs, _ = paired(mapping, params, problems)
    entries = {name.rpartition('/')[2]: value for name, value in variables.items()}
    if len(entries) < len(variables):
        problems.add('names of variables are the same but for what is before the last slash')
    rate = None
    if 'learning_rate' in entries:
        rate = as_number(entries.pop('learning_rate'))
        if rate is None or not math.isfinite(rate):
            problems.add("'learning_rate' is no finite number")
            rate = None
    start = tx.init(params)
    if rate is not None:
        start = with_injected(start, 'learning_rate', rate)
    trial = Trial(tx, start, params)
    _check_calls(every, trial.calls, problems)
    holds = any(name.endswith(_ACCUMULATOR) for name in entries)
    if entries and holds != (trial.calls > 1):
        has = 'has' if holds else 'has no'
        problems.add(
            f'Keras {has} gradient accumulators, and tx {_taking(trial.calls)}: give tx the '
            'gradient_accumulation_steps of the optimizer'
        )
    calls = _iteration(entries, trial.calls, problems)
    columns: Columns = {name: {} for name in _SLOTS}
    for pair in pairs.values():
        for moment, slot in (*_SLOTS.items(), (_ACCUMULATOR, _ACCUMULATOR)):
            label = _slot(pair, slot)
            if label not in entries:
                continue
            value = entries.pop(label)
            if moment != _ACCUMULATOR:
                collect(columns, moment, pair, repr(label), value, problems)
            elif (held := as_array(repr(label), value, problems)) is not None and held.any():
                problems.add(f'{label!r} holds gradients: convert at the end of an accumulation')
    for name in sorted(entries):
        problems.add(f'{name!r} belongs to no pair')

    def describe(moment: str, path: str) -> str:
        return repr(_slot(pairs[path], _SLOTS[moment])) if path in pairs else f'{path!r} {moment}'

    count = calls // trial.calls
    claims = _claims(pairs, rate)
    settle(trial, start, params, count, claims, columns['trace'], problems, to_ours=True)
    return Writer(columns, describe, problems).write(start, count, calls)


def _claims(pairs: Mapping[str, Pair], rate: float | None) -> dict[str, Claim]:
    claim = Claim(
        'Keras',
        inside=True,
        eps_in_sqrt=True,
        said={'rate': ('learning_rate', rate)},
        undo='change one of the two, or leave the variable out to leave it uncompared',
    )
    return dict.fromkeys(pairs, claim)


def _checked_steps(given: Any) -> int | None:
    return None if given is None else checked_steps('gradient_accumulation_steps', given, least=1)


def _check_calls(given: int | None, calls: int, problems: Problems) -> None:
    if given not in (None, calls):
        problems.add(f'gradient_accumulation_steps is {given}, but tx {_taking(calls)}')


def _taking(calls: int) -> str:
    return f'takes a step at every {calls} calls' if calls > 1 else 'takes a step at every call'


def _slot(pair: Pair, slot: str) -> str:
    return f'{pair.theirs.replace("/", "_")}_{slot}'


def _iteration(entries: dict[str, Any], every: int, problems: Problems) -> int:
    count = as_count(entries.pop('iteration', entries.pop('iterations', None)))
    if count is None:
        problems.add("'iteration' is missing or no step count")
        return 0
    if count % every:
        problems.add(
            f"'iteration' is {count}, in the middle of an accumulation of {every}: convert at "
            'its end'
        )
    return count


def to_keras(
    state: Any,
    params: Any,
    mapping: Iterable[Pair],
    *,
    tx: optax.GradientTransformation | None = None,
    learning_rate: Any = None,
    gradient_accumulation_steps: int | None = None,
) -> dict[str, np.ndarray]:
    """The variables of a Keras optimizer, by `v.name`, that goes on where our state stopped.

    Args:
      state: The state of our transformation.
      params: Our parameters.
      mapping: The pairs.
      tx: The transformation whose state it is; needed where that has a velocity or accumulates
        gradients.
      learning_rate: What Keras's variable of that name is to hold. If not given: what
        `inject_hyperparams` holds in the state; if there is none either, no such entry is written,
        as Keras has none where the learning rate is a schedule.
      gradient_accumulation_steps: As for `from_keras`.

    Raises:
      InterchangeError: Listing every moment without a pair or a counterpart in Keras, a learning
        rate or number of accumulated calls that `tx` contradicts, and every velocity that is on the
        other side of a learning rate that changes.
    """
    problems = Problems('the state cannot be written for Keras')
    every = _checked_steps(gradient_accumulation_steps)
    pairs, _ = paired(mapping, params, problems)
    moments = read(state, problems)
    if len(moments.counts) != 1:
        problems.add(f'the state has step counts {sorted(moments.counts)}, and Keras has one')
    for path in sorted(moments.weights):
        problems.add(f'{path!r} is bias-corrected, which Keras has not')
    count, velocities = max(moments.counts, default=0), moments.columns['trace']
    tx = checked_source('tx', tx, velocities, problems, also=accumulates(state))
    every = 1 if every is None else every
    if learning_rate is None:
        learning_rate = next(iter(injected(state, 'learning_rate').values()), None)
    if learning_rate is not None:
        constant('learning_rate', learning_rate, lower=-math.inf)
    if tx is not None:
        trial = Trial(tx, state, params)
        _check_calls(_checked_steps(gradient_accumulation_steps), trial.calls, problems)
        every, claims = trial.calls, _claims(pairs, as_number(learning_rate))
        settle(trial, state, params, count, claims, velocities, problems, to_ours=False)
    variables = {'iteration': np.array(count * every, np.int64)}
    if learning_rate is not None:
        variables['learning_rate'] = np.asarray(learning_rate)
    for moment, slot in _SLOTS.items():
        for path, array in moments.columns[moment].items():
            if path not in pairs:
                problems.add(f'{path!r} is in no pair')
                continue
            label = f'{moment} of {path!r}'
            turned = laid_out(label, pairs[path].layout.to_theirs, array, problems)
            if turned is not None:
                variables[_slot(pairs[path], slot)] = np.array(turned, order='C')
                if every > 1 and moment == 'nu':
                    variables[_slot(pairs[path], _ACCUMULATOR)] = np.zeros_like(turned)
    problems.raise_if_any()
    return variables
