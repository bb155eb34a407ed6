"""Optax: the states of `optax.rmsprop`, `optax.scale_by_rms` and `optax.scale_by_stddev`.

All four of its state classes are read and written: with and without a count (that is, bias
correction), centered and not. Names and layouts are ours already, and so is the sign of `trace`.
"""

from typing import Any

import optax

from rmsprop_jax._checks import checked_leaves, checked_transformation
from rmsprop_jax._types import decay_rate
from rmsprop_jax.interchange._mapping import Problems, checked_count
from rmsprop_jax.interchange._measure import Trial, near
from rmsprop_jax.interchange._sides import Claim, checked_source, settle
from rmsprop_jax.interchange._state import Moments, read
from rmsprop_jax.interchange._write import Writer

__all__ = ['from_optax', 'to_optax']
__dir__ = __all__.copy

_NAMES = {'cautious': 'caution', 'coupled': 'weight decay'}
_OPTAX = Claim('optax.rmsprop', inside=True, sign=1.0, extras=True)


def from_optax(
    theirs: Any,
    tx: optax.GradientTransformation,
    params: Any,
    *,
    source: optax.GradientTransformation | None = None,
    decay: float | None = None,
    count: int | None = None,
) -> Any:
    """The state of our `tx` that goes on where an Optax optimizer stopped.

    Args:
      theirs: The state of `optax.rmsprop`, or of a chain or wrapper that holds one.
      tx: `rmsprop_jax.rmsprop` with the same arguments, inside whatever wrappers.
      params: The parameters.
      source: The transformation whose state `theirs` is. Needed where that may have its velocity
        before the learning rate, as a chain of your own may; `optax.rmsprop` has it after.
      decay: The constant decay of a bias-corrected one, which divides by `1 - decay^count`.
      count: The step count for schedules. Needed where `theirs` has none, as with a constant
        learning rate and no bias correction; if nothing depends on it, pass 0.

    Returns:
      A state like `tx.init(params)`.

    Raises:
      InterchangeError: Listing every moment that is missing, left over, misshapen, of the wrong
        kind or not finite, a count or decay that is needed, and every velocity that is on the other
        side of a learning rate that changes.

    Warns:
      LossyConversionWarning: Where a centered second moment is smaller than its squared mean.

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
    problems = Problems('the Optax state cannot be converted')
    checked_transformation('tx', tx)
    checked_leaves('params', params)
    count = None if count is None else checked_count(count)
    decay = None if decay is None else float(decay_rate('decay', decay).value)
    moments = read(theirs, problems, 'theirs')
    if count is None:
        if len(moments.counts) != 1:
            found = f'has step counts {sorted(moments.counts)}' if moments.counts else 'has none'
            problems.add(f'no single step count: the state {found}: pass count')
        count = max(moments.counts, default=0)
    if moments.weights and decay is None:
        problems.add('the state is bias-corrected: pass its decay')

    def weight(path: str) -> float | None:
        if path not in moments.weights:
            return None
        steps, held = moments.weights[path]
        return _weight(decay, steps) if held is None else held

    def describe(moment: str, path: str) -> str:
        return f'{moment} of {path!r}'

    start, velocities = tx.init(params), moments.columns['trace']
    if source is None:
        claims = dict.fromkeys(velocities, _OPTAX)
    else:
        claims = _measured(checked_transformation('source', source), theirs, params, count)
    settle(tx, start, params, count, claims, velocities, problems, to_ours=True)
    return Writer(moments.columns, describe, problems, weight=weight).write(start, count)


def _measured(tx: Any, state: Any, params: Any, count: int) -> dict[str, Claim]:
    """The claims of a transformation that is at hand, by path."""
    trial = Trial(tx, state, params)
    claims: dict[str, Claim] = {}
    for path, action in trial.actions(count).items():
        # PyTorch's side: the gradient goes into the velocity as it is.
        outside = (
            action.steady_gain and near(abs(action.gain or 0.0), 1) and not near(action.response, 1)
        )
        names = ('rate', 'decay', 'eps', 'momentum', 'nesterov', 'cautious', 'coupled')
        claims[path] = Claim(
            'source',
            inside=not outside and action.steady,
            sign=action.response,
            eps_in_sqrt=action.eps_in_sqrt,
            said={x: (_NAMES.get(x, x), getattr(action, x)) for x in names},
            undo='give both transformations the same arguments',
            extras=True,
        )
    return claims


def _weight(decay: float | None, steps: int) -> float:
    return 1.0 if decay is None else 1.0 - decay**steps


def to_optax(
    state: Any,
    tx: optax.GradientTransformation,
    params: Any,
    *,
    source: optax.GradientTransformation | None = None,
    decay: float | None = None,
) -> Any:
    """The state of an Optax optimizer `tx` that goes on where our state stopped.

    Args:
      state: The state of our transformation.
      tx: `optax.rmsprop` with the same arguments, inside whatever wrappers.
      params: The parameters.
      source: Our transformation, whose state it is; needed where that has a velocity.
      decay: The constant decay of a bias-corrected one. Ours keeps the sum of its weights, Optax
        computes `1 - decay^count` instead: they must agree, and do not after a changing decay.

    Returns:
      A state like `tx.init(params)`. Where that has no step count, ours is not needed.

    Raises:
      InterchangeError: Listing every moment that is missing, left over or misshapen, weights that
        Optax could not find again, and all that `source` does otherwise than `tx`.
    """
    problems = Problems('the state cannot be written for Optax')
    checked_transformation('tx', tx)
    checked_leaves('params', params)
    decay = None if decay is None else float(decay_rate('decay', decay).value)
    moments = read(state, problems)
    if len(moments.counts) != 1:
        problems.add(f'the state has step counts {sorted(moments.counts)}: not one')
    _check_weights(moments, decay, problems)

    def weight(path: str) -> float | None:
        return moments.weights[path][1] if path in moments.weights else None

    def describe(moment: str, path: str) -> str:
        return f'{moment} of {path!r}'

    start, velocities = tx.init(params), moments.columns['trace']
    count = max(moments.counts, default=0)
    if checked_source('source', source, velocities, problems) is not None:
        claims = _measured(source, state, params, count)
        settle(tx, start, params, count, claims, velocities, problems, to_ours=True)
    return Writer(moments.columns, describe, problems, weight=weight).write(start, count)


def _check_weights(moments: Moments, decay: float | None, problems: Problems) -> None:
    if moments.weights and decay is None:
        problems.add('the state is bias-corrected: pass its decay')
        return
    for path, (steps, held) in moments.weights.items():
        # A float32 weight is a sum of up to 1 / (1 - decay) rounded terms.
        if held is not None and abs(held - _weight(decay, steps)) > 1e-4 * held:
            problems.add(
                f'{path!r}: its weights add up to {held:.6g}, not to 1 - {decay}^{steps} as Optax '
                'would have it: the decay was another one, or changed'
            )
