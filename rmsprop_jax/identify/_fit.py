"""Fits every candidate's unknown hyperparameters to a recorded run."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rmsprop_jax.identify._recording import Steps
from rmsprop_jax.identify._replay import (
    FLOAT32_ROUNDING,
    ZERO,
    Facts,
    PlainRule,
    Problem,
    Switches,
    form_of,
    replay,
)

HYPERPARAMETERS = ('decay', 'eps', 'momentum', 'weight_decay')
# Fitted values stay in these ranges. Momentum and weight decay count as present from the lower ends
# on, so 'none' and 'some' are different statements. A trace may leave both possible.
RANGES = {'decay': (1e-6, 1 - 1e-6), 'momentum': (0.01, 0.9999), 'weight_decay': (1e-5, 10.0)}
# The range of divisors of the recorded learning rate that a plain rule may use.
PLAIN_SCALE = (1e-6, 1e6)
# Errors are in units of the largest error that rounding can cause. That estimate is not exact, so
# a candidate between the two limits neither explains a run nor is ruled out.
EXPLAINED, RULED_OUT = 2.0, 10.0
_POINTS, _GUESSES, _STARTS, _ITERATIONS, _TOGETHER = 128, 6, 2, 15, 16


_Rule = Facts | PlainRule


class Fit(NamedTuple):
    """How well one candidate can explain a trace.

    Attributes:
      error: The largest deviation of a step, in units of the error that rounding can explain.
      values: The best hyperparameters, by name.
    """

    error: float
    values: dict[str, float]


class Box(NamedTuple):
    """The range of a candidate's coordinates; see `natural`. Each field has shape (4,).

    Attributes:
      low: The smallest values.
      high: The largest values.
      first_low: The smallest first guesses.
      first_high: The largest first guesses.
      pull: How strongly a coordinate is pulled to the middle; zero for an unknown one.
    """

    low: Any
    high: Any
    first_low: Any
    first_high: Any
    pull: Any


@jax.jit
def _best_of(problem: Problem, form: Any, switches: Switches, _: Box, points: Any) -> jax.Array:
    """The best few points of each candidate, best first. `points` has shape (candidates, n, 4)."""

    def one(switches: Switches, points: jax.Array) -> jax.Array:
        def mismatch(x: jax.Array) -> jax.Array:
            # Each term is bounded, because a first guess is always far off somewhere.
            seen = problem.after - problem.before
            steps, floor = replay(problem, form, switches, x)
            share = (seen - steps) ** 2 / (seen**2 + steps**2 + floor**2 + ZERO)
            return jnp.sum(jnp.where(problem.counts, share, 0.0))

        return points[jnp.argsort(jax.vmap(mismatch)(points))[:_GUESSES]]

    return jax.vmap(one)(switches, points)


@jax.jit
def _fit_from(
    problem: Problem, form: Any, switches: Switches, boxes: Box, starts: Any
) -> tuple[jax.Array, jax.Array]:
    """Fits candidates of one form from `starts` of shape (candidates, n, 4).

    Returns the largest residual and the coordinates of each.
    """

    def one(switches: Switches, box: Box, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        def residuals(x: jax.Array) -> jax.Array:
            steps, floor = replay(problem, form, switches, x)
            off = problem.after - problem.before - steps
            return jnp.where(problem.counts, off / (floor + ZERO), 0.0).ravel()

        errors, ends = jax.vmap(lambda x: _least_squares(residuals, x, box))(starts)
        winner = jnp.argmin(errors)
        return errors[winner], ends[winner]

    return jax.vmap(one)(switches, boxes, starts)


def _least_squares(residuals: Any, x: jax.Array, box: Box) -> tuple[jax.Array, jax.Array]:
    """Levenberg-Marquardt inside a box; known coordinates stay near its middle.

    Returns the largest residual at the final point, and the final point.
    """
    middle, size = (box.low + box.high) / 2, x.size
    with_slopes = jax.vmap(functools.partial(jax.jvp, residuals), (None, 0), (None, -1))

    def iterate(_: Any, carry: Any) -> Any:
        ahead, damping, kept = carry
        r, jacobian = with_slopes((ahead,), (jnp.eye(size),))
        off = ahead - middle
        cost = jnp.sum(r**2) + jnp.sum(box.pull * off**2)
        slope = jacobian.T @ r + box.pull * off
        normal = jacobian.T @ jacobian + jnp.diag(box.pull)
        better = cost < kept[0]
        new = (cost, jnp.max(jnp.abs(r)), ahead, slope, normal)
        kept = jax.tree.map(functools.partial(jnp.where, better), new, kept)
        damping = jnp.clip(jnp.where(better, damping / 5, damping * 4), 1e-12, 1e6)
        _, _, x, slope, normal = kept
        damped = normal + jnp.diag(jnp.diag(normal) * damping + 1e-9)
        # If epsilon is too small to matter, slopes are flat and full steps are meaningless.
        move = jnp.clip(jnp.linalg.solve(damped, slope), -2.0, 2.0)
        return jnp.clip(x - move, box.low, box.high), damping, kept

    nothing = (jnp.inf, jnp.inf, x, jnp.zeros(size), jnp.eye(size))
    nothing = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), nothing)
    _, _, kept = lax.fori_loop(0, _ITERATIONS, iterate, (x, jnp.asarray(0.05), nothing))
    return kept[1], kept[2]


def fit(
    steps: Steps,
    known: Mapping[str, float],
    facts: Sequence[_Rule],
    tolerance: float = 0.0,
    judged: int | None = None,
) -> list[Fit]:
    """Fits each candidate's unknown hyperparameters, in the order of `facts`.

    Args:
      steps: The recorded run.
      known: The known hyperparameters, by name.
      facts: The candidates, all of the same kind, because the best one helps to fit the others.
      tolerance: The relative error of the recorded gradients, if it is larger than rounding.
      judged: How many steps count, from the first; all if None.
    """
    steps = steps.reduced()
    same = facts
    if not np.ptp(steps.learning_rate):
        # A constant rate gives the same steps before and after momentum.
        same = [
            f if f.momentum == 'none' else dataclasses.replace(f, learning_rate='before momentum')
            for f in facts
        ]
    distinct = list(dict.fromkeys(same))
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend='cpu')[0]):
        batches = _batches(distinct, {f: _box(f, known, steps) for f in distinct})
        ends = _search(_padded(steps, tolerance, judged), batches)
    return [Fit(ends[f][0], _values(f, ends[f][1])) for f in same]


_Ends = dict[_Rule, tuple[float, np.ndarray]]


def _search(problem: Problem, batches: Sequence['_Batch']) -> _Ends:
    """The final point of each candidate's least squares, with its error.

    A poor first guess must not rule out a candidate. So each candidate is improved twice, from its
    final point and from the best point of a sweep over epsilon. While no candidate explains the
    run, all of this is repeated from other guesses.
    """
    guesses = [np.asarray(_best_of(problem, *b.given, _spread_over(b))) for b in batches]
    ends: _Ends = {}
    for first in range(0, _GUESSES, _STARTS):
        _improve(ends, problem, batches, [x[:, first : first + _STARTS] for x in guesses])
        for _ in range(2):
            best = ends[min(ends, key=lambda f: ends[f][0])][1]
            own = [np.stack([ends[f][1] for f in b.filled]) for b in batches]
            swept = [
                np.asarray(_best_of(problem, *b.given, _sweep(b, x, best)))[:, 0]
                for b, x in zip(batches, own, strict=True)
            ]
            starts = [np.stack(pair, axis=1) for pair in zip(own, swept, strict=True)]
            _improve(ends, problem, batches, starts)
        if min(error for error, _ in ends.values()) <= EXPLAINED:
            break
    return ends


def _improve(
    ends: _Ends, problem: Problem, batches: Sequence['_Batch'], starts: Sequence[np.ndarray]
) -> None:
    """Updates `ends` where `starts`, of shape (candidates, _STARTS, 4), lead to a better fit."""
    for batch, start in zip(batches, starts, strict=True):
        errors, where = map(np.asarray, _fit_from(problem, *batch.given, start))
        for f, error, end in zip(batch.facts, errors, where, strict=False):
            if f not in ends or error < ends[f][0]:
                ends[f] = (float(error), end)


class _Batch(NamedTuple):
    """Candidates of one form, padded to a fixed number, so that batches share compiled programs.

    Attributes:
      facts: The candidates.
      filled: The candidates, padded with copies of the first.
      given: The arguments that the programs take for `filled`: form, switches, boxes.
    """

    facts: list[_Rule]
    filled: list[_Rule]
    given: tuple[Any, Switches, Box]


def _batches(facts: Sequence[_Rule], boxes: Mapping[_Rule, Box]) -> list[_Batch]:
    made = []
    for number in sorted({form_of(f) for f in facts}):
        group = [f for f in facts if form_of(f) == number]
        for first in range(0, len(group), _TOGETHER):
            some = group[first : first + _TOGETHER]
            full = [*some, *some[:1] * (_TOGETHER - len(some))]
            switches = Switches(*np.array([_switches(f) for f in full], float).T)
            stacked = Box(*(np.stack(x) for x in zip(*(boxes[f] for f in full), strict=True)))
            made.append(_Batch(some, full, (np.int32(number), switches, stacked)))
    return made


def _spread_over(batch: _Batch) -> np.ndarray:
    """Points spread evenly over the box of each candidate."""
    box = batch.given[2]
    width = box.first_high - box.first_low
    return box.first_low[:, None] + width[:, None] * _spread()


def _sweep(batch: _Batch, own: np.ndarray, best: np.ndarray) -> np.ndarray:
    """A sweep over epsilon, with each candidate's own other coordinates and with those of the best.

    Along epsilon the error has flat parts and several valleys, which least squares cannot leave.
    """
    box = batch.given[2]
    points = np.stack([own, np.broadcast_to(best, own.shape)], axis=1)
    points = np.repeat(points, _POINTS // 2, axis=1)
    along = np.linspace(box.first_low[:, 1], box.first_high[:, 1], _POINTS // 2, axis=1)
    points[:, :, 1] = np.tile(along, (1, 2))
    return np.clip(points, box.low[:, None], box.high[:, None])


def _switches(facts: _Rule) -> tuple[bool, ...]:
    plain = isinstance(facts, PlainRule)
    return (
        plain and facts.rule == 'signSGD',
        not plain and facts.start == 'one',
        not plain and facts.bias_correction == 'yes',
        facts.learning_rate != 'after momentum',
        facts.momentum == 'Nesterov',
        facts.weight_decay == 'coupled',
        facts.weight_decay == 'decoupled',
    )


def _values(facts: _Rule, x: np.ndarray) -> dict[str, float]:
    decay, momentum = 1 / (1 + np.exp(-x[[0, 2]]))
    values = {'decay': float(decay), 'eps': float(np.exp(x[1]))}
    values['momentum'] = 0.0 if facts.momentum == 'none' else float(momentum)
    values['weight_decay'] = 0.0 if facts.weight_decay == 'none' else float(np.exp(x[3]))
    return {name: 0.0 if value < 1e-200 else value for name, value in values.items()}


def _coordinate(name: str, value: float) -> float:
    value = max(value, ZERO)
    logarithmic = name in ('eps', 'weight_decay')
    return float(np.log(value) if logarithmic else np.log(value) - np.log1p(-value))


def _box(facts: _Rule, known: Mapping[str, float], steps: Steps) -> Box:
    """The ranges of a candidate's hyperparameters, and of their first guesses."""
    fixed = dict(known)
    if isinstance(facts, PlainRule):
        fixed['decay'] = 0.5  # Unused: a plain rule has no decay.
        fixed.pop('eps', None)
        eps, first_eps = PLAIN_SCALE, PLAIN_SCALE
    else:
        eps, first_eps = _epsilons(facts, steps)
    ranges = {**RANGES, 'eps': eps}
    guesses = {
        'decay': (0.3, 0.9995),
        'eps': first_eps,
        'momentum': (0.1, 0.99),
        'weight_decay': (1e-4, 1.0),
    }
    if facts.momentum == 'none':
        fixed['momentum'] = 0.0
    if facts.weight_decay == 'none':
        fixed['weight_decay'] = 0.0
    rows = []
    for name in HYPERPARAMETERS:
        if name in fixed:
            middle, slack = _coordinate(name, fixed[name]), _slack(name, fixed[name])
            rows.append((middle - slack, middle + slack, middle, middle, slack**-2))
        else:
            low, high = (_coordinate(name, value) for value in ranges[name])
            first = [_coordinate(name, value) for value in guesses[name]]
            rows.append((low, high, *first, 0.0))
    return Box(*np.array(rows).T)


_Range = tuple[float, float]


def _epsilons(facts: Facts, steps: Steps) -> tuple[_Range, _Range]:
    """The range of epsilon, and of its first guesses."""
    size = np.abs(steps.gradients)[steps.gradients != 0]
    small, large = (size.min(), size.max()) if size.size else (1.0, 1.0)
    # Second moments lie between the squares of the smallest and the largest gradient, or near 1.
    large = max(large, 1.0) if facts.start == 'one' else large
    power = 2 if facts.epsilon == 'inside the root' else 1
    return (
        ((1e-12 * small) ** power, (1e6 * large) ** power),
        ((1e-4 * small) ** power, (10 * large) ** power),
    )


def _slack(name: str, value: float) -> float:
    """How far a known hyperparameter may be from its coordinate.

    It is known only to rounding: frameworks store it, and also `1 - decay`, in float32.
    """
    relative = 2 * FLOAT32_ROUNDING
    return relative / (1 - value) if name in ('decay', 'momentum') else relative


def _padded(steps: Steps, tolerance: float, judged: int | None) -> Problem:
    """Pads arrays to one of a few shapes, so that traces of similar size share a program."""
    length, width = steps.gradients.shape
    shape = (_rounded_up(2 * length) // 2, _rounded_up(width))

    def pad(x: np.ndarray, *sizes: int, fill: float = 0.0) -> np.ndarray:
        gaps = [(0, size - have) for size, have in zip(sizes, x.shape, strict=True)]
        return np.pad(x, gaps, constant_values=fill)

    return Problem(
        pad(steps.before, *shape),
        pad(steps.after, *shape),
        pad(steps.gradients, *shape),
        pad(steps.learning_rate, shape[0]),
        pad(steps.rounding, shape[1], fill=1.0),
        pad(np.maximum(steps.rounding, max(FLOAT32_ROUNDING, tolerance)), shape[1], fill=1.0),
        pad(np.ones((length, width), bool)[:judged], *shape),
    )


def _rounded_up(size: int) -> int:
    """The next of 32, 64, 128 and so on."""
    return max(32, 1 << (size - 1).bit_length())


@functools.cache
def _spread() -> np.ndarray:
    """First guesses in the unit cube: a Halton sequence, the same in every call."""
    return np.array([[_mirrored(n, base) for base in (2, 3, 5, 7)] for n in range(1, _POINTS + 1)])


def _mirrored(number: int, base: int) -> float:
    """The radical inverse of `number`: its digits in reverse order, after the point."""
    result, unit = 0.0, 1.0
    while number:
        unit /= base
        number, digit = divmod(number, base)
        result += digit * unit
    return result
