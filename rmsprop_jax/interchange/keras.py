"""Keras 3: the variables of `keras.optimizers.RMSprop`.

Collect them by name, and put them back the same way::

    model = keras.saving.load_model(path)
    variables = {v.name: v.numpy() for v in model.optimizer.variables}
    for v in model.optimizer.variables:
        v.assign(converted[v.name])

A `.weights.h5` file has numbers in the place of names, and so needs the model: compile it, call
`model.optimizer.build(model.trainable_variables)`, then `model.load_weights(path)`. Without `build`
Keras leaves the optimizer's state out, and only warns.

Keras names a slot after the path of its variable, such as `sequential/dense/kernel`, with
underscores: `sequential_dense_kernel_velocity`. In a `Pair`, `theirs` is that path. Keys may also
be the `v.path` of the optimizer's variables, which starts with the optimizer's own name.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import optax

from rmsprop_jax._checks import checked_flag, checked_steps, checked_transformation
from rmsprop_jax._types import constant
from rmsprop_jax.interchange._counterpart import Counterpart, Exchange
from rmsprop_jax.interchange._mapping import (
    AS_IS,
    CELLS,
    EntryError,
    Layout,
    Pair,
    as_array,
    as_count,
    as_number,
    checked_names,
    joined,
    layer,
    layers_of,
)
from rmsprop_jax.interchange._measure import Trial
from rmsprop_jax.interchange._state import injected, with_injected

__all__ = ['batch_stats', 'dense', 'from_keras', 'norm', 'recurrent', 'to_keras']
__dir__ = __all__.copy

_SLOTS = {'nu': 'velocity', 'mu': 'average_gradient', 'trace': 'momentum', 'ema': 'average'}
_ACCUMULATOR = 'gradient_accumulator'


def dense(
    theirs: str, ours: str | tuple[Any, ...], *, bias: bool = True, layout: Layout = AS_IS
) -> tuple[Pair, ...]:
    """The pairs of Keras's `Dense` or `Conv` and Flax's. Their axes have the same order.

    Example:
      >>> from rmsprop_jax import interchange
      >>> [(pair.theirs, pair.ours) for pair in interchange.keras.dense('net/dense', 'Dense_0')]
      [('net/dense/kernel', 'Dense_0/kernel'), ('net/dense/bias', 'Dense_0/bias')]
    """
    return layer(theirs, ours, ('/kernel', 'kernel'), ('/bias', 'bias'), bias, layout)


conv = dense


def norm(theirs: str, ours: str | tuple[Any, ...], *, bias: bool = True) -> tuple[Pair, ...]:
    """The pairs of Keras's normalisation layers and Flax's: `gamma` is `scale`."""
    return layer(theirs, ours, ('/gamma', 'scale'), ('/beta', 'bias'), bias)


def batch_stats(theirs: str, ours: str | tuple[Any, ...]) -> tuple[Pair, ...]:
    """The pairs of the statistics of Keras's `BatchNormalization` with those of Flax's.

    `moving_mean` is `mean` and `moving_variance` is `var`. Both frameworks average the biased
    variance. See `torch.batch_stats` for how to use them.
    """
    return layer(theirs, ours, ('/moving_mean', 'mean'), ('/moving_variance', 'var'), True)


def recurrent(
    theirs: str, ours: str | tuple[Any, ...], cell: str, *, bias: bool = True
) -> tuple[Pair, ...]:
    """The pairs of the cell of Keras's `LSTM` or `GRU` with a cell of Flax.

    Keras has the gates of a cell in one array, and `LSTMCell` of Flax has an array for each; see
    `torch.recurrent`. The LSTMs have the same one bias. The GRUs order their gates differently:
    update, reset, candidate in Keras, and reset, update, candidate in Flax.

    **GRU.** Keras's bias has two rows, one for the input and one for the hidden state. Flax's
    `GRUCell` has the first only, so give it the second:
    `cell.dense_h = nnx.Linear(hidden, 3 * hidden, rngs=rngs)`. With `reset_after=False`, which is
    not Keras's default, a GRU is another function, which Flax does not have. Its kernels have the
    same shapes.

    Args:
      theirs: The path of the cell, `'lstm/lstm_cell'`.
      ours: The path of our cell.
      cell: `'nnx.LSTMCell'`, `'nnx.OptimizedLSTMCell'`, `'nnx.GRUCell'` or `'linen.LSTMCell'`. The
        last one also fits Linen's `OptimizedLSTMCell`.
      bias: Whether it has one.

    Raises:
      ValueError: If `cell` is none of these.

    Example:
      >>> from rmsprop_jax import interchange
      >>> pairs = interchange.keras.recurrent('gru/gru_cell', 'cell', 'nnx.GRUCell')
      >>> [(p.ours, p.layout.part) for p in pairs if p.theirs == 'gru/gru_cell/bias']
      [('cell/dense_i/bias', (0, 2, 0)), ('cell/dense_h/bias', (1, 2, 0))]

    Source: Keras 3.15, keras/src/layers/rnn/lstm.py and gru.py; Flax 0.12.8,
    flax/nnx/nn/recurrent.py.
    """
    # For Linen's GRUCell, the two rows of a bias would have to be split into gates.
    halves = layers_of(cell, [name for name in CELLS if name != 'linen.GRUCell'])
    if not isinstance(theirs, str):
        raise TypeError(f'theirs must be a name, got {theirs!r}.')
    is_gru, has_bias = cell == 'nnx.GRUCell', checked_flag('bias', bias)
    blocks = (1, 0, 2) if is_gru else ()
    pairs: list[Pair] = []
    for half, kernel, gates in zip((0, 1), ('kernel', 'recurrent_kernel'), halves, strict=True):
        for i, gate in enumerate(gates):
            path, number = f'{joined(ours)}/{gate}', len(gates)
            layout = Layout(part=(i, number, 1), blocks=blocks)
            pairs.append(Pair(f'{theirs}/{kernel}', f'{path}/kernel', layout))
            if has_bias and (is_gru or half == 1):
                row = Layout((1,), part=(half, 2, 0), blocks=blocks)
                layout = row if is_gru else Layout(part=(i, number, 0))
                pairs.append(Pair(f'{theirs}/bias', f'{path}/bias', layout))
    return tuple(pairs)


def from_keras(
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: Any,
    mapping: Iterable[Pair],
    *,
    gradient_accumulation_steps: int | None = None,
) -> Any:
    """The state with which `tx` continues where Keras's optimizer stopped.

    Args:
      variables: The optimizer's variables by name.
      tx: `dialects.keras(...)` with the optimizer's settings, inside any wrappers.
      params: Our parameters.
      mapping: The pairs.
      gradient_accumulation_steps: The optimizer's setting, to check it against `tx`, which decides.
        Keras's `iteration` counts calls, and this many calls make one step. A state in the middle
        of an accumulation cannot be converted.

    Returns:
      A state like `tx.init(params)`. The `trace` of `dialects.keras` is the negative of Keras's
      `momentum`. The variable `learning_rate` is written to the state of `inject_hyperparams`, if
      `tx` uses that; otherwise make `tx` with it:
      `dialects.keras(float(variables['learning_rate']))`.

    Raises:
      InterchangeError: Listing every entry that is missing, left over, misshapen, of the wrong kind
        or not finite; a `learning_rate` or a number of accumulated calls that `tx` contradicts; and
        every velocity on the other side of a learning rate that changes.

    Warns:
      LossyConversionWarning: If a centered second moment is smaller than its squared mean.

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
    exchange = Exchange('the Keras variables cannot be converted', params, mapping)
    checked_transformation('tx', tx)
    checked_names('variables', variables)
    entries = {name.rpartition('/')[2]: value for name, value in variables.items()}
    if len(entries) < len(variables):
        exchange.add('some variable names differ only before their last slash')
    rate, start = None, tx.init(params)
    if 'learning_rate' in entries:
        rate = as_number(entries.pop('learning_rate'))
        if rate is None or not math.isfinite(rate):
            exchange.add("'learning_rate' is not a finite number")
        else:
            start = with_injected(start, 'learning_rate', rate)
    trial = Trial(tx, start, params)
    every = _calls_a_step(trial, gradient_accumulation_steps, exchange)
    _take_accumulators(entries, every, exchange)
    calls = _iteration(entries, every, exchange)
    exchange.counterparts = _counterparts(exchange, rate)
    theirs = exchange.collected(entries, [calls // every])

    def describe(moment: str, path: str) -> str:
        if path not in exchange.counterparts:
            return f'{path!r} {moment}'
        return repr(exchange.counterparts[path].names[moment])

    return exchange.adopted(theirs, trial, describe, calls=calls)


def _counterparts(exchange: Exchange, rate: float | None) -> dict[str, Counterpart]:
    return {
        path: Counterpart(
            'Keras',
            {moment: _slot(pair, slot) for moment, slot in _SLOTS.items()},
            eps_in_sqrt=True,
            said={'rate': ('learning_rate', rate)},
            undo='change one of the two, or leave the variable out to leave it uncompared',
        )
        for path, pair in exchange.by_path.items()
    }


def _slot(pair: Pair, slot: str) -> str:
    return f'{pair.theirs.replace("/", "_")}_{slot}'


def _calls_a_step(trial: Trial | None, given: Any, exchange: Exchange) -> int:
    """How many calls make a step of `tx`; without `tx`, the given number."""
    if given is not None:
        given = checked_steps('gradient_accumulation_steps', given, least=1)
    if trial is None:
        return given or 1
    if given not in (None, trial.calls):
        exchange.add(f'gradient_accumulation_steps is {given}, but tx {_taking(trial.calls)}')
    return trial.calls


def _taking(calls: int) -> str:
    return f'takes a step at every {calls} calls' if calls > 1 else 'takes a step at every call'


def _take_accumulators(entries: dict[str, Any], every: int, exchange: Exchange) -> None:
    """Removes the gradient accumulators, which must exist if and only if calls accumulate."""
    held = any(name.endswith(_ACCUMULATOR) for name in entries)
    if entries and held != (every > 1):
        exchange.add(
            f'Keras {"has" if held else "has no"} gradient accumulators, but tx {_taking(every)}: '
            'give tx the gradient_accumulation_steps of the optimizer'
        )
    for pair in exchange.by_path.values():
        name = _slot(pair, _ACCUMULATOR)
        with exchange.noted():
            if name in entries and as_array(repr(name), entries.pop(name)).any():
                raise EntryError(f'{name!r} is not zero: convert at the end of an accumulation')


def _iteration(entries: dict[str, Any], every: int, exchange: Exchange) -> int:
    count = as_count(entries.pop('iteration', entries.pop('iterations', None)))
    if count is None:
        exchange.add("'iteration' is missing or not a step count")
        return 0
    if count % every:
        exchange.add(
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
    """The variables, by `v.name`, with which a Keras optimizer continues from our state.

    Args:
      state: The state of our transformation.
      params: Our parameters.
      mapping: The pairs.
      tx: The transformation that `state` belongs to. Needed if the state has a velocity or
        accumulates gradients.
      learning_rate: The value of Keras's variable `learning_rate`. Defaults to the rate that
        `inject_hyperparams` keeps in the state. Without either, no such variable is written; Keras
        has none if the learning rate is a schedule.
      gradient_accumulation_steps: As for `from_keras`.

    Raises:
      InterchangeError: Listing every moment without a pair or a counterpart in Keras; a learning
        rate or a number of accumulated calls that `tx` contradicts; and every velocity on the other
        side of a learning rate that changes.
    """
    exchange = Exchange('the state cannot be written for Keras', params, mapping)
    moments, trial = exchange.our_moments('Keras', tx, state, counts_calls=True)
    every = _calls_a_step(trial, gradient_accumulation_steps, exchange)
    if learning_rate is None:
        learning_rate = next(iter(injected(state, 'learning_rate').values()), None)
    if learning_rate is not None:
        constant('learning_rate', learning_rate, lower=-math.inf)
    exchange.counterparts = _counterparts(exchange, as_number(learning_rate))
    variables = exchange.released(moments, trial)
    exchange.raise_if_any()
    if every > 1:
        for path in moments.columns['nu']:
            accumulator = _slot(exchange.by_path[path], _ACCUMULATOR)
            variables[accumulator] = np.zeros_like(
                variables[exchange.counterparts[path].names['nu']]
            )
    variables['iteration'] = np.array(moments.count * every, np.int64)
    if learning_rate is not None:
        variables['learning_rate'] = np.asarray(learning_rate)
    return variables
