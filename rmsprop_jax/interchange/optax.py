"""Optax: the states of `optax.rmsprop`, `optax.scale_by_rms` and `optax.scale_by_stddev`.

All four of its state classes are read and written: with and without a count (for bias correction),
centered and not. Names, layouts and the sign of `trace` are the same as ours.
"""

import dataclasses
from typing import Any

import optax

from rmsprop_jax._checks import checked_leaves, checked_transformation
from rmsprop_jax._types import decay_rate
from rmsprop_jax.interchange._counterpart import Counterpart, Exchange
from rmsprop_jax.interchange._mapping import checked_count
from rmsprop_jax.interchange._measure import Trial, near
from rmsprop_jax.interchange._state import Moments, moments_in

__all__ = ['from_optax', 'to_optax']
__dir__ = __all__.copy

_NAMES = {'cautious': 'caution', 'coupled': 'weight decay'}
_OPTAX = Counterpart('optax.rmsprop', sign=1.0, extras=True)


def from_optax(
    theirs: Any,
    tx: optax.GradientTransformation,
    params: Any,
    *,
    source: optax.GradientTransformation | None = None,
    decay: float | None = None,
    count: int | None = None,
) -> Any:
    """The state with which our `tx` continues where an Optax optimizer stopped.

    Args:
      theirs: The state of `optax.rmsprop`, or of a chain or wrapper that contains it.
      tx: `rmsprop_jax.rmsprop` with the same arguments, inside any wrappers.
      params: The parameters.
      source: The transformation that `theirs` belongs to. Needed if its velocity may come before
        the learning rate, as in a chain of your own; in `optax.rmsprop` it comes after.
      decay: The constant decay of a bias-corrected state, which is divided by `1 - decay^count`.
      count: The step count for schedules. Needed if `theirs` has none, as with a constant learning
        rate and no bias correction. If nothing depends on it, pass 0.

    Returns:
      A state like `tx.init(params)`.

    Raises:
      InterchangeError: Listing every moment that is missing, left over, misshapen, of the wrong
        kind or not finite; a count or decay that is needed; and every velocity on the other side of
        a learning rate that changes.

    Warns:
      LossyConversionWarning: If a centered second moment is smaller than its squared mean.

    Example:
      >>> import jax.numpy as jnp, optax, rmsprop_jax
      >>> from rmsprop_jax import interchange
      >>> theirs, params = optax.rmsprop(0.1, momentum=0.9), jnp.zeros(2)
      >>> _, state = theirs.update(jnp.ones(2), theirs.init(params))
      >>> tx = rmsprop_jax.rmsprop(0.1, momentum=0.9)
      >>> interchange.from_optax(state, tx, params, count=1)[0].nu
      Array([0.1, 0.1], dtype=float32)

    Source: Optax 0.2.8, optax/_src/transform.py.
    """
    decay = _checked(tx, params, decay)
    exchange = Exchange('the Optax state cannot be converted', params)
    count = None if count is None else checked_count(count)
    moments = moments_in(theirs, exchange, 'theirs')
    if count is not None:
        moments = dataclasses.replace(moments, counts=[count])
    elif len(moments.counts) != 1:
        several = f'step counts {sorted(moments.counts)}, not exactly one'
        exchange.add(f'the state has {several if moments.counts else "no step count"}: pass count')
    weights = {**_weights_there(moments, decay, exchange), **moments.weights}
    exchange.counterparts = dict.fromkeys(moments.columns['trace'], _OPTAX)
    if source is not None:
        trial = Trial(checked_transformation('source', source), theirs, params)
        exchange.counterparts = _measured(trial, moments.count)
    moments = dataclasses.replace(moments, weights=weights)
    return exchange.adopted(moments, Trial(tx, tx.init(params), params))


def _checked(tx: Any, params: Any, decay: float | None) -> float | None:
    """Checks the arguments that both directions share, and returns `decay`."""
    checked_transformation('tx', tx)
    checked_leaves('params', params)
    return None if decay is None else float(decay_rate('decay', decay).value)


def _weights_there(moments: Moments, decay: float | None, exchange: Exchange) -> dict[str, float]:
    """The sum of weights that Optax computes for each bias-corrected path."""
    if moments.corrected and decay is None:
        exchange.add('the state is bias-corrected: pass its decay')
    return {
        path: 1.0 if decay is None else 1.0 - decay**steps
        for path, steps in moments.corrected.items()
    }


def _measured(trial: Trial, count: int) -> dict[str, Counterpart]:
    """What a given transformation does after `count` steps, by path."""
    counterparts: dict[str, Counterpart] = {}
    for path, action in trial.actions(count).items():
        # As in PyTorch: the gradient enters the velocity unscaled.
        outside = (
            action.steady_gain and near(abs(action.gain or 0.0), 1) and not near(action.response, 1)
        )
        names = ('rate', 'decay', 'eps', 'momentum', 'nesterov', 'cautious', 'coupled')
        counterparts[path] = Counterpart(
            'source',
            inside=not outside and action.steady,
            sign=action.response,
            eps_in_sqrt=action.eps_in_sqrt,
            said={x: (_NAMES.get(x, x), getattr(action, x)) for x in names},
            undo='give both transformations the same arguments',
            extras=True,
        )
    return counterparts


def to_optax(
    state: Any,
    tx: optax.GradientTransformation,
    params: Any,
    *,
    source: optax.GradientTransformation | None = None,
    decay: float | None = None,
) -> Any:
    """The state with which an Optax optimizer `tx` continues where our state stopped.

    Args:
      state: The state of our transformation.
      tx: `optax.rmsprop` with the same arguments, inside any wrappers.
      params: The parameters.
      source: Our transformation, which `state` belongs to. Needed if the state has a velocity.
      decay: The constant decay of a bias-corrected state. Our state keeps the sum of the weights;
        Optax computes `1 - decay^count` instead. The two must agree, which they do not if the decay
        changed.

    Returns:
      A state like `tx.init(params)`. If `tx` has no step count, ours is not used.

    Raises:
      InterchangeError: Listing every moment that is missing, left over or misshapen, weights that
        Optax would not reproduce, and every difference between `source` and `tx`.
    """
    decay = _checked(tx, params, decay)
    exchange = Exchange('the state cannot be written for Optax', params)
    moments = moments_in(state, exchange)
    if len(moments.counts) != 1:
        exchange.add(f'the state has step counts {sorted(moments.counts)}, not exactly one')
    there = _weights_there(moments, decay, exchange)
    for path, held in moments.weights.items():
        # A float32 weight is a sum of up to 1 / (1 - decay) rounded terms.
        if decay is not None and abs(held - there[path]) > 1e-4 * held:
            exchange.add(
                f'{path!r}: its weights add up to {held:.6g}, but Optax computes 1 - {decay}^'
                f'{moments.corrected[path]}: the decay was different, or changed'
            )
    trial = exchange.our_trial('source', source, state, moments)
    if trial is not None:
        exchange.counterparts = _measured(trial, moments.count)
    return exchange.adopted(moments, Trial(tx, tx.init(params), params))
