"""Candidates, and the steps that each of them takes on a recorded run.

A candidate is a combination of facts. It is replayed in float64 by a chain of this package's
transformations. One differentiable program covers all candidates and all hyperparameters.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rmsprop_jax._momentum import trace
from rmsprop_jax._precondition import scale_by_rms
from rmsprop_jax.dialects._record import Epsilon, Momentum, RatePlace, Start, WeightDecay, YesNo

# TensorFlow and Keras round hyperparameters to float32 whatever the dtype of the parameters.
FLOAT32_ROUNDING = 2.0**-24
# Replaces an exact zero, whose logarithm or reciprocal is not finite.
ZERO = 1e-300
IN, OUT = 'inside the root', 'outside the root'
# Each of these facts needs its own branch in the program; the other facts are numbers. The branch
# after these replays the plain rules, which have no second moment.
FORMS = tuple(itertools.product((IN, OUT), ('no', 'yes')))


@dataclasses.dataclass(frozen=True)
class Facts:
    """What distinguishes one RMSProp from another, in words.

    Attributes:
      epsilon: Where epsilon is added.
      start: The second moment before the first step.
      bias_correction: Whether averages are divided by the sum of their weights.
      centered: Whether the variance replaces the second moment.
      momentum: The kind of momentum.
      learning_rate: Whether the learning rate multiplies the input or the output of the momentum.
      weight_decay: Whether weight decay is added to the gradient (coupled) or subtracted from the
        parameter (decoupled).
    """

    epsilon: Epsilon
    start: Start
    bias_correction: YesNo
    centered: YesNo
    momentum: Momentum
    learning_rate: RatePlace
    weight_decay: WeightDecay


@dataclasses.dataclass(frozen=True)
class PlainRule:
    """An optimizer without a second moment, to which RMSProp converges in a limit.

    RMSProp turns into SGD as its decay goes to 1 or epsilon becomes large, and into signSGD as its
    decay and epsilon go to 0.

    Attributes:
      rule: Whether the direction is the gradient (SGD) or its sign (signSGD).
      momentum: The kind of momentum.
      learning_rate: Whether the learning rate multiplies the input or the output of the momentum.
      weight_decay: Whether weight decay is added to the gradient (coupled) or subtracted from the
        parameter (decoupled).
    """

    rule: Literal['SGD', 'signSGD']
    momentum: Momentum
    learning_rate: RatePlace
    weight_decay: WeightDecay


def form_of(facts: Facts | PlainRule) -> int:
    """The number of the branch that replays `facts`."""
    if isinstance(facts, PlainRule):
        return len(FORMS)
    return FORMS.index((facts.epsilon, facts.centered))


_Kinds = list[tuple[Momentum, RatePlace]]


def _endings(
    momentum: float | None, weight_decay: float | None
) -> tuple[_Kinds, list[WeightDecay]]:
    """The kinds of momentum and of weight decay that these numbers allow; None means unknown."""
    kinds: _Kinds = [] if momentum else [('none', 'no momentum')]
    if momentum != 0:
        places: tuple[RatePlace, ...] = ('before momentum', 'after momentum')
        styles: tuple[Momentum, ...] = ('heavy ball', 'Nesterov')
        kinds += itertools.product(styles, places)
    decays: list[WeightDecay] = []
    if not weight_decay:
        decays.append('none')
    if weight_decay != 0:
        decays.extend(('coupled', 'decoupled'))
    return kinds, decays


def candidates(momentum: float | None, weight_decay: float | None) -> tuple[Facts, ...]:
    """All combinations of facts that a momentum and a weight decay allow; None means unknown."""
    kinds, decays = _endings(momentum, weight_decay)
    starts = (('zero', 'no'), ('one', 'no'), ('zero', 'yes'))
    combinations = itertools.product((IN, OUT), starts, ('no', 'yes'), kinds, decays)
    return tuple(
        Facts(eps, start, correction, centered, style, place, decay)  # pyright: ignore
        for eps, (start, correction), centered, (style, place), decay in combinations
    )


def plain_rules(momentum: float | None, weight_decay: float | None) -> tuple[PlainRule, ...]:
    """All plain rules that a momentum and a weight decay allow; None means unknown."""
    kinds, decays = _endings(momentum, weight_decay)
    return tuple(
        PlainRule(rule, style, place, decay)  # pyright: ignore
        for rule, (style, place), decay in itertools.product(('SGD', 'signSGD'), kinds, decays)
    )


class Problem(NamedTuple):
    """The trace as the compiled program gets it: padded, with `counts` False in the padding."""

    before: Any
    after: Any
    gradients: Any
    learning_rate: Any
    rounding: Any
    relative: Any
    counts: Any


class Switches(NamedTuple):
    """A candidate's facts as numbers, 0 or 1, except those in `FORMS`."""

    sign: Any
    start: Any
    corrected: Any
    rate_first: Any
    nesterov: Any
    coupled: Any
    decoupled: Any


def natural(x: jax.Array) -> tuple[jax.Array, ...]:
    """Decay, epsilon, momentum and weight decay from unbounded coordinates."""
    return jax.nn.sigmoid(x[0]), jnp.exp(x[1]), jax.nn.sigmoid(x[2]), jnp.exp(x[3])


def replay(
    problem: Problem, form: jax.Array, switches: Switches, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The steps a candidate takes on the recorded gradients and parameters, and their rounding.

    A plain rule has no epsilon. It divides by that coordinate instead, which scales the learning
    rate.

    Rounding is estimated to first order. At step t (from 1) the direction has an error of `4 + t`
    roundings, or more if a difference cancels. Momentum and learning rate act on this error as they
    act on the direction. Storing the parameter rounds once, or twice if the parameter decays first.
    """
    decay, eps, momentum, weight_decay = natural(x)
    rates = problem.learning_rate
    # The factors before and after the momentum.
    first = jnp.where(switches.rate_first == 1, rates, 1.0)
    last = jnp.where(switches.rate_first == 1, 1.0, rates)
    preconditions = _preconditions(switches, decay, eps)
    momenta: Any = trace(momentum, nesterov=True)

    def direction(n: int, g: Any, whole: Any, states: Any) -> tuple[Any, jax.Array, Any]:
        u, state = preconditions[n].update(whole, states[n])
        condition = _condition(whole, g, state, eps if FORMS[n][0] == IN else eps**2)
        return u, jnp.abs(u) * condition, (*states[:n], state, *states[n + 1 :])

    def plain(g: Any, whole: Any, states: Any) -> tuple[jax.Array, jax.Array, Any]:
        u = jnp.where(switches.sign == 1, jnp.sign(whole), whole) / eps
        return u, jnp.abs(u) * _cancellation(whole, g), states

    branches = [*(functools.partial(direction, n) for n in range(len(FORMS))), plain]

    def accelerate(u: Any, state: Any) -> tuple[jax.Array, Any]:
        ahead, state = momenta.update(u, state)
        return jnp.where(switches.nesterov == 1, ahead, state.trace), state

    def step(carry: Any, now: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        count, moments, moved, spread = carry
        p, g, rate, before, after = now
        whole = g + switches.coupled * weight_decay * p
        u, error, moments = lax.switch(form, branches, g, whole, moments)
        u, moved = accelerate(before * u, moved)
        error, spread = accelerate((4 + count) * jnp.abs(before) * error, spread)
        taken = -after * u - rate * switches.decoupled * weight_decay * p
        return (count + 1, moments, moved, spread), (taken, jnp.abs(after) * error)

    like = problem.before[0]
    moments = tuple(precondition.init(like) for precondition in preconditions)
    carry = (jnp.array(1.0), moments, momenta.init(like), momenta.init(like))
    recorded = (problem.before, problem.gradients, rates, first, last)
    _, (steps, errors) = lax.scan(step, carry, recorded)
    stored = jnp.maximum(jnp.abs(problem.before), jnp.abs(problem.after))
    rounding = problem.rounding * (1.0 + switches.decoupled) * stored
    # A direction that is a thousand times too large must not be excused by its own rounding error.
    most = jnp.max(jnp.abs(problem.after - problem.before), axis=0)
    relative = jnp.minimum(problem.relative * errors, most)
    return steps, lax.stop_gradient(rounding + relative)


def _preconditions(switches: Switches, decay: jax.Array, eps: jax.Array) -> list[Any]:
    """The transformation of each form."""

    def decay_at(count: Any) -> jax.Array:
        # A bias-corrected average is a plain one with a growing decay, rho (1 - rho^(t-1)) / (1 -
        # rho^t). Since that is only a number, it needs no separate program.
        before = count.astype(decay.dtype) * jnp.log(decay)
        growing = decay * jnp.expm1(before) / jnp.expm1(before + jnp.log(decay))
        return jnp.where(switches.corrected == 1, growing, decay)

    return [
        scale_by_rms(decay_at, eps, switches.start, eps_in_sqrt=place == IN, centered=c == 'yes')
        for place, c in FORMS
    ]


def _cancellation(whole: jax.Array, g: jax.Array) -> jax.Array:
    """The factor by which adding weight decay to a gradient magnifies a relative error."""
    added = jnp.abs(whole - g) + jnp.abs(g)
    return added / jnp.maximum(jnp.abs(whole), 1e-3 * added + ZERO)


def _condition(whole: jax.Array, g: jax.Array, moments: Any, offset: jax.Array) -> jax.Array:
    """The factor by which cancellation magnifies the relative rounding error of a direction.

    Frameworks subtract mu^2 from nu; adding weight decay to a gradient may cancel too.
    """
    condition = _cancellation(whole, g)
    if moments.var is not None:
        raised = moments.var + moments.mu**2
        condition += raised / jnp.maximum(moments.var + offset, 1e-4 * raised + ZERO)
    return condition
