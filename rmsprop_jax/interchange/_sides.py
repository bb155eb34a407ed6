"""Compares what another optimizer does to a parameter with what ours does, and converts velocities.

A velocity has the learning rate in it (Keras, TensorFlow, Optax, timm by default) or not (PyTorch,
Stable-Baselines3). Both give the same steps while the rate is constant, and then one is the rate
times the other. Where the rate changes they are different algorithms, and nothing is converted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from rmsprop_jax._checks import checked_transformation
from rmsprop_jax.interchange._mapping import Problems
from rmsprop_jax.interchange._measure import Action, Trial, near
from rmsprop_jax.interchange._state import wide

_SIDES = {True: 'inside the velocity', False: 'outside the velocity'}
_ROOTS = {True: 'inside the root', False: 'outside the root'}


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is known of the other optimizer.

    Attributes:
      framework: Its name.
      inside: Whether the learning rate is inside the velocity.
      sign: What the velocity is multiplied by on its way to the parameter, if so.
      eps_in_sqrt: Where epsilon is; None where that is not known.
      said: By attribute of `Action`: how they call it, and what it is there. None where that is
        not known.
      undo: How a contradiction is resolved.
      climbs: Whether gradients are flipped first.
      extras: Whether it may look ahead or be cautious, which is then not compared.
    """

    framework: str
    inside: bool
    sign: float = -1.0
    eps_in_sqrt: bool | None = None
    said: Mapping[str, tuple[str, float | None]] = dataclasses.field(default_factory=dict)
    undo: str = 'change one of the two'
    climbs: bool = False
    extras: bool = False


def settle(
    tx: optax.GradientTransformation | Trial,
    state: Any,
    params: Any,
    count: int,
    claims: Mapping[str, Claim],
    velocities: dict[str, Any],
    problems: Problems,
    *,
    to_ours: bool,
) -> None:
    """Compares the claims with what `tx` does after `count` steps, and converts `velocities`.

    Nothing is done where there are problems already: the count may be wrong.

    Args:
      tx: Our transformation.
      state: A state of it, for its counts and injected hyperparameters.
      params: Our parameters.
      count: Steps taken.
      claims: What is known of theirs, by our paths.
      velocities: By our paths, changed in place.
      problems: Where contradictions go.
      to_ours: Whether they are theirs and become ours, or ours and become theirs.
    """
    if problems:
        return
    trial = tx if isinstance(tx, Trial) else Trial(tx, state, params)
    actions = trial.actions(count)
    # Schedulers that set the rate before a step leave the last one in the checkpoint.
    last = functools.cache(lambda: trial.actions(count - 1) if count else {})
    for path, claim in claims.items():
        action, velocity = actions.get(path), velocities.get(path)
        if action is not None:
            _compare(path, claim, action, lambda path=path: last().get(path), count, problems)
        if velocity is None or (action is not None and action.gain is None):
            continue  # A velocity without a place is told when it is written.
        factor = _factor(path, claim, action, trial.fault, problems)
        if factor is not None:
            velocities[path] = (
                _times(velocity, factor)
                if to_ours
                else _times(velocity, 1 / factor).astype(velocity.dtype)
            )


def checked_source(
    name: str, tx: Any, velocities: Mapping[str, Any], problems: Problems, also: bool = False
) -> Any:
    """Returns our transformation, which is needed where there are velocities or `also` says so."""
    if tx is not None:
        return checked_transformation(name, tx)
    if also:
        problems.add(
            f'the state accumulates gradients: pass {name}, the transformation whose state it is, '
            'which says over how many calls'
        )
    if velocities:
        listed = ', '.join(map(repr, sorted(velocities)))
        problems.add(
            f'the state has a velocity for {listed}, and does not tell whether the learning rate '
            f'is inside it or outside: pass {name}, the transformation whose state it is'
        )
    return None


def _times(velocity: np.ndarray, factor: float) -> np.ndarray:
    if abs(factor) == 1:
        return velocity if factor > 0 else -velocity
    return wide(velocity) * factor


def _compare(
    path: str,
    claim: Claim,
    action: Action,
    last: Callable[[], Action | None],
    count: int,
    problems: Problems,
) -> None:
    """Notes where the two do something else; `last` is what was done at the step before."""
    for name, (key, theirs) in claim.said.items():
        ours = getattr(action, name)
        if theirs is not None and not math.isnan(ours) and not _agree(name, theirs, ours):
            before = last() if name in ('rate', 'decoupled') else None
            if before is not None and _agree(name, theirs, getattr(before, name)):
                continue
            problems.add(
                f'{path!r}: {key} is {theirs:.6g} there, and {ours:.6g} in tx after {count} steps: '
                f'{claim.undo}'
            )
    theirs, ours = claim.eps_in_sqrt, action.eps_in_sqrt
    if theirs is not None and ours is not None and theirs != ours:
        problems.add(
            f'{path!r}: {claim.framework} adds epsilon {_ROOTS[theirs]}, and tx {_ROOTS[ours]}'
        )
    if action.rate < 0 and not claim.extras and claim.said.get('rate', ('', None))[1] is None:
        problems.add(f'{path!r}: tx climbs, and {claim.framework} descends')
    if action.nesterov and not claim.extras:
        problems.add(
            f'{path!r}: tx looks one step ahead (nesterov), which {claim.framework} has not'
        )
    if action.cautious and not claim.extras and 'cautious' not in claim.said:
        problems.add(f'{path!r}: tx is cautious, which {claim.framework} is not')


def _agree(name: str, theirs: float, ours: float) -> bool:
    if name == 'eps':
        return abs(theirs - ours) <= 1e-3 * abs(theirs) + 1e-12
    if name == 'decay':
        return abs(theirs - ours) <= 1e-4 * abs(1 - theirs) + 1e-7
    # What is seen of weight decay has the rounding of an update that may have been scaled.
    least = 1e-6 if name == 'coupled' else 1e-9
    return math.isnan(theirs) or abs(theirs - ours) <= 1e-4 * abs(theirs) + least


def _factor(
    path: str, claim: Claim, action: Action | None, fault: str | None, problems: Problems
) -> float | None:
    """Our velocity by theirs, or None with the reason noted."""
    line = f'{path!r}: in {claim.framework} the learning rate is {_SIDES[claim.inside]}'
    if action is None or math.isnan(action.response + action.momentum):
        reason = fault or 'its updates do not show it'
        problems.add(f'{line}, and whether it is in tx cannot be found: {reason}')
        return None
    if not (action.steady if claim.inside else action.steady_gain):
        problems.add(
            f'{line}, and in tx {_SIDES[not claim.inside]}, where it changes in time: that is '
            'another algorithm, which cannot go on from this velocity'
        )
        return None
    gain = -(action.gain or 0.0) if claim.climbs else action.gain or 0.0
    if not claim.inside and near(abs(gain), 1):
        return math.copysign(1, gain)
    if not action.response:
        problems.add(
            f'{line}, and in tx {_SIDES[not claim.inside]}, where it is 0 now: nothing tells what '
            'it has been'
        )
        return None
    said = claim.said.get('rate', ('', None))[1]
    downhill = action.rate if said is None else said
    outside = downhill if claim.climbs else -downhill
    factor = (claim.sign if claim.inside else outside) / action.response
    return math.copysign(1, factor) if near(abs(factor), 1) else factor
