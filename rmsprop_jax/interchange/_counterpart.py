"""The optimizer on the other side, and the conversion of moments in both directions.

A velocity includes the learning rate (Keras, TensorFlow, Optax, timm by default) or does not
(PyTorch, Stable-Baselines3). With a constant rate both take the same steps, and one velocity is the
rate times the other. With a changing rate they are different algorithms, and nothing is converted.
"""

import dataclasses
import functools
import math
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from rmsprop_jax._checks import checked_transformation
from rmsprop_jax.interchange._mapping import (
    Conversion,
    EntryError,
    Pair,
    in_our_axes,
    in_their_axes,
    pair_of,
    whole,
)
from rmsprop_jax.interchange._measure import Action, Trial, near
from rmsprop_jax.interchange._state import (
    MOMENTS,
    Columns,
    Moments,
    Writer,
    accumulates,
    described,
    moments_in,
    wide,
)

_SIDES = {True: 'inside the velocity', False: 'outside the velocity'}
_ROOTS = {True: 'inside the root', False: 'outside the root'}


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """What is known about the optimizer on the other side, for one of our parameters.

    Attributes:
      framework: The name of the framework.
      names: Its names for the moments of the parameter. Moments that it does not have are missing.
      inside: Whether the learning rate is inside the velocity.
      sign: If so, the factor between the velocity and the update of the parameter.
      eps_in_sqrt: Whether epsilon is inside the root; None if unknown.
      said: For each attribute of `Action`, the framework's name for it and its value there, or
        None if unknown.
      undo: How to resolve a contradiction, for messages.
      climbs: Whether gradients are negated first.
      extras: Whether it may use Nesterov momentum or caution, which are then not compared.
    """

    framework: str
    names: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inside: bool = True
    sign: float = -1.0
    eps_in_sqrt: bool | None = None
    said: Mapping[str, tuple[str, float | None]] = dataclasses.field(default_factory=dict)
    undo: str = 'change one of the two'
    climbs: bool = False
    extras: bool = False

    @property
    def rate(self) -> float | None:
        """The learning rate, if known."""
        return self.said.get('rate', ('', None))[1]


class Exchange(Conversion):
    """A conversion of states, in both directions.

    From them: `collected`, then `adopted`. To them: `our_moments`, then `released`.

    Attributes:
      counterparts: What is known about the other optimizer, by our paths.
    """

    counterparts: Mapping[str, Counterpart] = types.MappingProxyType({})

    def collected(
        self,
        arrays: Mapping[Any, Any],
        counts: Collection[int],
        label: Callable[[Any], str] = repr,
        check: Callable[[str, Pair, Any], None] = lambda *entry: None,
    ) -> Moments:
        """Their moments, with our axes.

        Args:
          arrays: Their arrays by name.
          counts: Their step counts.
          label: Maps the name of an array to its name in messages.
          check: Raises an `EntryError` for a label, a pair and an array that do not fit.
        """
        columns: Columns = {moment: {} for moment in MOMENTS}
        strays = dict(arrays)
        for path, theirs in self.counterparts.items():
            for moment, name in theirs.names.items():
                if name in arrays:
                    strays.pop(name, None)  # Which has happened if another path has a part of it.
                    columns[moment][path] = None
                    entry = label(name), self.by_path[path], arrays[name]
                    with self.noted():
                        check(*entry)
                        columns[moment][path] = in_our_axes(*entry)
        for name in sorted(strays):
            self.add(f'{label(name)} does not belong to any pair')
        return Moments(columns, counts)

    def adopted(
        self,
        theirs: Moments,
        trial: Trial,
        describe: Callable[[str, str], str] = described,
        fresh: Collection[str] = (),
        calls: int | None = None,
    ) -> Any:
        """The state from which ours continues: the state of `trial` with their moments.

        Raises:
          InterchangeError: If anything does not fit, including problems noted earlier.
        """
        self._settle(theirs, trial, to_ours=True)
        return Writer(theirs, describe, self, fresh).write(trial.start, calls)

    def our_moments(
        self, framework: str, tx: Any, state: Any, counts_calls: bool = False
    ) -> tuple[Moments, Trial | None]:
        """The moments in our state, and our transformation; None if it is not needed.

        A framework has one step count and no bias correction. With `counts_calls`, it counts calls.
        """
        moments = moments_in(state, self)
        counts = sorted(moments.counts)
        if len(counts) != 1:
            self.add(f'the state has step counts {counts}, but {framework} has exactly one')
        for path in sorted(moments.corrected):
            self.add(f'{path!r} is bias-corrected, which {framework} does not support')
        if tx is None and counts_calls and accumulates(state):
            self.add(
                'the state accumulates gradients: pass tx, the transformation whose state it is, '
                'to show over how many calls'
            )
        return moments, self.our_trial('tx', tx, state, moments)

    def our_trial(self, name: str, tx: Any, state: Any, moments: Moments) -> Trial | None:
        """Our transformation; callers must pass it, as `name`, if the state has velocities."""
        if tx is not None:
            return Trial(checked_transformation(name, tx), state, self.params)
        if moments.columns['trace']:
            listed = ', '.join(map(repr, sorted(moments.columns['trace'])))
            self.add(
                f'the state has a velocity for {listed}, but does not show whether the learning '
                f'rate is inside or outside it: pass {name}, the transformation whose state it is'
            )
        return None

    def released(
        self,
        moments: Moments,
        trial: Trial | None,
        adapt: Callable[[str, str, np.ndarray], np.ndarray] = lambda moment, path, array: array,
    ) -> dict[Any, np.ndarray]:
        """Our arrays under their names and with their axes.

        Args:
          moments: Our moments.
          trial: Our transformation; None if it is not needed.
          adapt: Converts an array to its form there, or raises an `EntryError`.
        """
        if trial is not None:
            self._settle(moments, trial, to_ours=False)
        parts: dict[Any, dict[str, np.ndarray]] = {}
        for moment, column in moments.columns.items():
            for path, array in column.items():
                with self.noted():
                    adapted = adapt(moment, path, array)
                    pair = pair_of(path, self.by_path)
                    name = self.counterparts[path].names[moment]
                    part = in_their_axes(described(moment, path), pair, adapted)
                    parts.setdefault(name, {})[path] = part
        arrays: dict[Any, np.ndarray] = {}
        for name, found in parts.items():
            theirs = self.by_path[next(iter(found))].theirs
            with self.noted():
                arrays[name] = whole(repr(theirs), self.by_name[theirs], found)
        return arrays

    def _settle(self, moments: Moments, trial: Trial, to_ours: bool) -> None:
        """Compares the counterparts with what our transformation does, and converts velocities.

        Does nothing if a problem was noted before, since the step count may then be wrong.

        Args:
          moments: The step count, and the velocities, which are changed in place.
          trial: Our transformation.
          to_ours: True if their velocities become ours, False if ours become theirs.
        """
        if self.has_problems():
            return
        count, velocities = moments.count, moments.columns['trace']
        actions = trial.actions(count)
        # Schedulers that set the rate before a step leave the last one in the checkpoint.
        last = functools.cache(lambda: trial.actions(count - 1) if count else {})
        for path, theirs in self.counterparts.items():
            action, velocity = actions.get(path), velocities.get(path)
            if action is not None:
                for line in _contradictions(
                    theirs, action, lambda path=path: last().get(path), count
                ):
                    self.add(f'{path!r}: {line}')
            if velocity is None or (action is not None and action.gain is None):
                continue  # Writing reports a velocity without a place.
            with self.noted():
                factor = _factor(path, theirs, action, trial.fault)
                converted = _times(velocity, factor if to_ours else 1 / factor)
                velocities[path] = converted if to_ours else converted.astype(velocity.dtype)
        self._warn_of_norms(trial, count)

    def _warn_of_norms(self, trial: Trial, count: int) -> None:
        """Warns if our parts of one array of theirs are clipped by their own norms."""
        shared = [[str(p.ours) for p in pairs] for pairs in self.by_name.values() if len(pairs) > 1]
        lines = []
        for parts in trial.clipped_apart(count, shared):
            theirs = self.by_path[parts[0]].theirs
            framework = self.counterparts[parts[0]].framework
            *others, last = map(repr, parts)
            lines.append(f'{", ".join(others)} and {last} are one array in {framework}, {theirs!r}')
        if lines:
            warnings.warn(
                'tx scales or clips each array by its own norm, which cannot be the same here: '
                f'{"; ".join(lines)}. Clip the parts of an array together, by optax.partition',
                stacklevel=5,
            )


def _times(velocity: np.ndarray, factor: float) -> np.ndarray:
    if abs(factor) == 1:
        return velocity if factor > 0 else -velocity
    return wide(velocity) * factor


def _contradictions(
    theirs: Counterpart, action: Action, last: Callable[[], Action | None], count: int
) -> Iterator[str]:
    """A line for each difference between the two; `last` returns the action one step earlier."""
    for name, (key, there) in theirs.said.items():
        here = getattr(action, name)
        if there is None or math.isnan(here) or _agree(name, there, here):
            continue
        before = last() if name in ('rate', 'decoupled') else None
        if before is None or not _agree(name, there, getattr(before, name)):
            found = f'{here:.6g} in tx after {count} steps'
            yield f'{key} is {there:.6g} there, and {found}: {theirs.undo}'
    there, here = theirs.eps_in_sqrt, action.eps_in_sqrt
    if there is not None and here is not None and there != here:
        yield f'{theirs.framework} adds epsilon {_ROOTS[there]}, and tx {_ROOTS[here]}'
    if theirs.extras:
        return
    if action.rate < 0 and theirs.rate is None:
        yield f'tx climbs, and {theirs.framework} descends'
    if action.nesterov:
        yield f'tx looks one step ahead (nesterov), which {theirs.framework} does not'
    if action.cautious and 'cautious' not in theirs.said:
        yield f'tx is cautious, which {theirs.framework} is not'


def _agree(name: str, theirs: float, ours: float) -> bool:
    if name == 'eps':
        return abs(theirs - ours) <= 1e-3 * abs(theirs) + 1e-12
    if name == 'decay':
        return abs(theirs - ours) <= 1e-4 * abs(1 - theirs) + 1e-7
    # Measured weight decay has the rounding error of an update that may have been scaled.
    least = 1e-6 if name == 'coupled' else 1e-9
    return math.isnan(theirs) or abs(theirs - ours) <= 1e-4 * abs(theirs) + least


def _factor(path: str, theirs: Counterpart, action: Action | None, fault: str | None) -> float:
    """The ratio of our velocity to theirs.

    Raises:
      EntryError: If one cannot be converted to the other.
    """
    line = f'{path!r}: in {theirs.framework} the learning rate is {_SIDES[theirs.inside]}'
    other = f'{line}, but in tx it is {_SIDES[not theirs.inside]}'
    if action is None or math.isnan(action.response + action.momentum):
        reason = fault or 'the updates of tx do not show it'
        raise EntryError(f'{line}, and where it is in tx cannot be found: {reason}')
    if not (action.steady if theirs.inside else action.steady_gain):
        raise EntryError(
            f'{other} and changes over time: that is another algorithm, which cannot continue '
            'from this velocity'
        )
    gain = -(action.gain or 0.0) if theirs.climbs else action.gain or 0.0
    if not theirs.inside and near(abs(gain), 1):
        return math.copysign(1, gain)
    if not action.response:
        raise EntryError(f'{other} and is 0 now: its earlier value is unknown')
    downhill = action.rate if theirs.rate is None else theirs.rate
    outside = downhill if theirs.climbs else -downhill
    factor = (theirs.sign if theirs.inside else outside) / action.response
    return math.copysign(1, factor) if near(abs(factor), 1) else factor
