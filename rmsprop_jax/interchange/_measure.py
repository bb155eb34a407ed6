"""What a transformation does to each parameter, measured by trying it out.

A state does not show on which side of the learning rate its velocity is: `chain(rms, clip, trace,
scale)` and `chain(rms, scale, trace, clip)` have states of the same structure. The update does show
it. If the gradient and the parameter are so small that nothing is clipped or decayed, the update is
linear in the velocity, and one call of `tx.update` shows that derivative without rounding. The
derivatives by the gradient and by the parameter are found in the same way. Second moments are so
large that epsilon does not matter, to show the learning rate, or small, to show epsilon.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_map_with_path

from rmsprop_jax._types import RmsState, by_path, path_name, wide_dtype
from rmsprop_jax.interchange._mapping import named_leaves, sharding_of
from rmsprop_jax.interchange._state import (
    accumulates,
    is_average,
    is_centered,
    is_compact,
    is_corrected,
    is_named,
    leaves_named,
    map_nodes,
    nodes_of,
    with_counts,
)

_GRADIENT, _PARAMETER, _VELOCITY, _MOMENT = 1e-12, 1e-8, 1e-4, 1e12
# How many steps after the current one to look at the learning rate.
_LATER = (1, 2, 5, 10, 30, 100, 300, 1000, 3000, 10**4, 10**5, 10**6, 10**9)
_MOST_CALLS = 2**20
_LAST = 2**31 - 2


@dataclasses.dataclass(frozen=True)
class Action:
    """What happens to one parameter at one step. NaN marks values that could not be found.

    Attributes:
      rate: How far a unit direction moves the parameter downhill; negative if it climbs.
      decay: The decay of the second moment.
      eps: Epsilon, in the unit of the gradient outside the root, in its square inside.
      eps_in_sqrt: Whether epsilon is inside the root; None if it is too small to tell.
      coupled: The weight decay that is added to the gradient.
      decoupled: The decoupled weight decay, times the learning rate.
      momentum: The decay of the velocity; 0 without a velocity.
      response: The derivative of the update by the new velocity: one if the learning rate is inside
        the velocity, minus the rate if it is applied after it.
      nesterov: Whether the update looks one step ahead.
      cautious: Whether entries of the update that do not oppose the gradient are set to zero.
      gain: What a unit direction adds to the velocity; None without a velocity.
      steady: Whether the response is the same at later steps.
      steady_gain: Whether the gain is the same at later steps.
    """

    rate: float
    decay: float
    eps: float = math.nan
    eps_in_sqrt: bool | None = None
    coupled: float = math.nan
    decoupled: float = math.nan
    momentum: float = 0.0
    response: float = math.nan
    nesterov: bool = False
    cautious: bool = False
    gain: float | None = None
    steady: bool = True
    steady_gain: bool = True


class _Step(NamedTuple):
    """What one update does to one parameter whose entries are all the same number.

    Attributes:
      update: The update.
      moment: The second moment after the update.
      weight: The divisor of the second moment.
      mean: The mean gradient after the update; None if there is none.
      velocity: The velocity after the update; None if there is none.
    """

    update: float
    moment: float
    weight: float
    mean: float | None
    velocity: float | None

    @property
    def root(self) -> float:
        """The root of the second moment, without epsilon."""
        return math.sqrt(self.moment / self.weight)


class Trial:
    """A transformation and a state at which to try it out.

    Attributes:
      start: The state.
      calls: How many calls make a step.
      fault: Why the trial failed; None if it did not.
    """

    def __init__(self, tx: optax.GradientTransformation, state: Any, params: Any):
        self._update = optax.with_extra_args_support(tx).update
        self.start, self.calls, self.fault = state, 1, None
        self._decays: dict[str, float] = {}
        try:
            # Wide parameters, so that updates are as wide as the accumulators always are.
            self._params = jax.tree.map(lambda p: _full(p, 0, wide_dtype(p.dtype)), params)
            self._ranks = {path: p.ndim for path, p in named_leaves(self._params).items()}
            start = tx.init(self._params)
            if by_path(start).keys() != by_path(state).keys():
                self.fault = 'tx.init makes a state of another structure'
                return
            # The state of an nnx.Optimizer has the same leaves, inside its own variables.
            state = jax.tree.unflatten(jax.tree.structure(start), jax.tree.leaves(state))
            self._state = _with_scalars_of(state, start)
            if any(map(is_compact, nodes_of(self._state))):
                self.fault = 'the statistics of tx are rounded'
                return
            # Outside jit, a step that contains `lax.cond` would be compiled at each call.
            if leaves_named(state, 'mini_step', 'notfinite_count'):
                self._update = jax.jit(self._update)
            self.calls = self._found_calls()
        except Exception as error:  # A foreign transformation may raise anything.
            self.fault = f'tx raises {type(error).__name__}: {error}'

    def actions(self, count: int) -> dict[str, Action]:
        """The action after `count` steps on each parameter with a second moment; empty after a
        fault."""
        if self.fault is not None:
            return {}
        try:
            return self._measured(min(count, _LAST))
        except Exception as error:  # As above.
            self.fault = f'tx raises {type(error).__name__}: {error}'
            return {}

    def _measured(self, count: int) -> dict[str, Action]:
        at = functools.partial(self._at, count)
        large, small, decayed = at(), at(moment=lambda path: 0.0), at(parameter=_PARAMETER)
        felt = {path: self._felt(large[path], small[path]) for path in large}
        found = {path: _plain(g, large[path], decayed[path]) for path, g in felt.items()}
        roots = {
            path: _ratio(-found[path].rate * g, small[path].update) for path, g in felt.items()
        }
        at_root = at(moment=lambda path: _or_zero(roots.get(path, 0.0)) ** 2)
        for path, root in roots.items():
            found[path] = _with_epsilon(found[path], root, small[path], at_root[path])
        responses = _responses(large, felt)
        if responses:
            # Caution zeroes entries that have the gradient's sign, that is, entries that climb.
            uphill = {p: -_VELOCITY if x.response < 0 else _VELOCITY for p, x in responses.items()}
            pushed = at(velocity=lambda path: uphill.get(path, _VELOCITY))
            for path, now in responses.items():
                found[path] = _with_velocity(found[path], now, uphill[path], pushed[path])
            self._follow(found, felt, count)
        return found

    def _felt(self, large: _Step, small: _Step) -> float:
        """The gradient that reaches the second moment; it may have been scaled before."""
        complement = 1 - large.moment / _MOMENT
        if not complement > 0:
            return math.nan
        if small.mean is None:
            felt = math.sqrt(small.moment / complement)
        else:
            felt = abs(small.mean) / complement
        for usual in (_GRADIENT, _GRADIENT / self.calls):
            if abs(felt - usual) < 1e-3 * usual:
                return usual
        return felt

    def _follow(self, found: dict[str, Action], felt: Mapping[str, float], count: int) -> None:
        """Records in each action whether its response and gain are the same at later steps."""
        for later in _LATER:
            steps = self._at(min(count + later, _LAST))
            for path, then in _responses(steps, felt).items():
                action, response = found[path], then.response
                # A momentum that has changed looks like another response.
                response /= 1 + action.momentum * action.nesterov
                found[path] = dataclasses.replace(
                    action,
                    response=response if math.isnan(action.response) else action.response,
                    steady=action.steady and _near_or_nan(response, action.response),
                    steady_gain=action.steady_gain and near(then.gain, action.gain or 0.0),
                )

    def _at(
        self,
        count: int,
        moment: Callable[[str], float] | None = None,
        velocity: Callable[[str], float] = lambda path: 0.0,
        parameter: float = 0.0,
    ) -> dict[str, _Step]:
        """One update of each parameter with a second moment, starting from these values."""
        # An average copies the parameters at its first call, so it does not affect the update.
        state = _with_mini_step(with_counts(self._state, count, -1), self.calls - 1)

        def fill(node: Any) -> Any:
            start = moment or (lambda path: _MOMENT)
            values = {'nu': start, 'var': start, 'trace': velocity}
            return node._replace(
                **{
                    name: _filled(getattr(node, name), values.get(name, lambda path: 0.0))
                    for name in ('nu', 'var', 'mu', 'trace', 'ema')
                    if getattr(node, name, None) is not None
                }
            )

        gradient = jax.tree.map(lambda p: _full(p, _GRADIENT), self._params)
        params = jax.tree.map(lambda p: _full(p, parameter), self._params)
        updates, after = self._update(gradient, map_nodes(fill, state), params)
        return self._steps(updates, after, shows_decay=moment is None)

    def _steps(self, updates: Any, state: Any, shows_decay: bool) -> dict[str, _Step]:
        columns: dict[str, dict[str, float]] = {'nu': {}, 'mu': {}, 'trace': {}}
        weights: dict[str, float] = {}
        for node in nodes_of(state):
            if is_average(node):
                continue
            for name, values in columns.items():
                is_var = name == 'nu' and is_centered(node)
                found = self._values(node.var if is_var else getattr(node, name, None))
                # Two moments of the same kind cannot be distinguished.
                values.update({k: math.nan if k in values else v for k, v in found.items()})
                if name == 'nu':
                    if shows_decay:
                        self._decays |= {path: value / _MOMENT for path, value in found.items()}
                    weights |= {p: _weight(node, self._decays[p]) for p in found}
        updated, (moments, means, velocities) = self._values(updates), columns.values()
        return {
            p: _Step(updated[p], moments[p], weights[p], means.get(p), velocities.get(p))
            for p in moments.keys() & updated.keys()
        }

    def _values(self, tree: Any) -> dict[str, float]:
        leaves = named_leaves(tree)
        return {path: _uniform(x, self._ranks.get(path, 0)) for path, x in leaves.items()}

    def _found_calls(self) -> int:
        """How many calls make a step, by bisection: every call but the last raises `mini_step`."""

        def waits(mini_step: int) -> bool:
            state = _with_mini_step(with_counts(self._state, 0, 0), mini_step)
            _, after = self._update(self._params, state, self._params)
            steps = {int(x) for x in leaves_named(after, 'mini_step')}
            return steps == {mini_step + 1}

        if not accumulates(self._state):
            return 1
        most = 1
        while waits(most - 1):
            most *= 2
            if most > _MOST_CALLS:
                raise ValueError(f'it does not step in {most} calls')
        # The first number of calls whose last one does not wait.
        least = most // 2 + 1
        return bisect.bisect_left(range(most), True, least, key=lambda n: not waits(n - 1))


def _full(like: Any, value: float, dtype: Any = None) -> jax.Array:
    return jnp.full(like.shape, value, dtype or like.dtype, device=sharding_of(like))


def _with_scalars_of(state: Any, like: Any) -> Any:
    """`like` with the counts, learning rates and other scalars of `state`."""
    return jax.tree.map(lambda x, y: y if jnp.ndim(y) else x, state, like)


def _with_mini_step(state: Any, value: int) -> Any:
    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        return _full(x, value) if is_named(path, 'mini_step') else x

    return tree_map_with_path(leaf, state)


def _filled(tree: Any, value: Callable[[str], float]) -> Any:
    return tree_map_with_path(lambda path, x: _full(x, value(path_name(path))), tree)


def _uniform(x: Any, rank: int) -> float:
    """The real number that all entries equal, or NaN."""
    values = np.real(np.asarray(x))
    if values.ndim > rank:
        values = values[..., 0]  # Complex numbers are stored as pairs of reals.
    if not values.size:
        return math.nan
    low, high = float(values.min()), float(values.max())
    return low if high - low <= 1e-5 * max(abs(low), abs(high)) else math.nan


def _weight(node: Any, decay: float) -> float:
    """The divisor of the moments."""
    if not is_corrected(node):
        return 1.0
    if isinstance(node, RmsState):
        return float(node.weight)  # pyright: ignore[reportArgumentType]
    return 1 - decay ** int(node.count)


class _Response(NamedTuple):
    """The ratio of the update to the velocity when a gradient moves both, and what a unit direction
    adds to the velocity."""

    response: float
    gain: float


def _responses(steps: Mapping[str, _Step], felt: Mapping[str, float]) -> dict[str, _Response]:
    return {
        path: _Response(
            _ratio(step.update, step.velocity), _ratio(step.velocity * step.root, felt[path])
        )
        for path, step in steps.items()
        if step.velocity is not None
    }


def _plain(felt: float, large: _Step, decayed: _Step) -> Action:
    """The action without a velocity and epsilon."""
    # Rounding leaves zero if an update is computed from a parameter and then separated again.
    more = decayed.update - large.update if decayed.update else math.nan
    return Action(
        rate=_ratio(-large.update * large.root, felt),
        decay=large.moment / _MOMENT,
        coupled=_ratio(more, large.update) * felt / _PARAMETER,
        decoupled=-more / _PARAMETER,
    )


def _with_velocity(action: Action, now: _Response, before: float, pushed: _Step) -> Action:
    """The action with what a velocity that was `before` shows after the step."""
    after = math.nan if pushed.velocity is None else pushed.velocity
    momentum = 0.0 if abs(after / before) < 1e-6 else after / before
    # The response to the stored velocity. With Nesterov it is smaller than the response to the
    # gradient, by the factor momentum.
    stored = _ratio(pushed.update, after) if momentum else math.nan
    cautious = bool(now.response) and stored == 0
    nesterov = bool(now.response) and bool(stored) and not _near_or_nan(stored, now.response)
    ahead = 1 + momentum * nesterov
    return dataclasses.replace(
        action,
        rate=action.rate / ahead,
        momentum=momentum,
        response=stored if math.isnan(now.response) else now.response / ahead,
        nesterov=nesterov,
        cautious=cautious,
        gain=now.gain,
    )


def _with_epsilon(action: Action, root: float, small: _Step, at_root: _Step) -> Action:
    """The action with epsilon. If the second moment is epsilon squared, the denominator doubles
    with epsilon outside the root, and grows by the square root of two inside."""
    own = small.root
    if not root > 4 * own:
        return action if math.isnan(root) else dataclasses.replace(action, eps=0.0)
    change = _ratio(small.update, at_root.update)
    held = at_root.root / root
    inside = abs(change - math.hypot(1, held)) < abs(change - (1 + held))
    eps = root**2 - own**2 if inside else root - own
    return dataclasses.replace(action, eps=eps, eps_in_sqrt=inside)


def _or_zero(x: float) -> float:
    return x if math.isfinite(x) else 0.0


def _ratio(x: float, y: float) -> float:
    return x / y if y else math.nan


def near(x: float, y: float) -> bool:
    """Whether two measured numbers are the same up to rounding."""
    return abs(x - y) <= 1e-5 * max(abs(x), abs(y))


def _near_or_nan(x: float, y: float) -> bool:
    return near(x, y) or math.isnan(x + y)
