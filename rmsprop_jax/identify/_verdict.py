"""`identify_dialect`, and what it says about each fact."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rmsprop_jax.dialects._record import RECORDS
from rmsprop_jax.identify._fit import EXPLAINED, HYPERPARAMETERS, RANGES, RULED_OUT, fit
from rmsprop_jax.identify._recording import Steps, Trace, lay_out, read_trace
from rmsprop_jax.identify._replay import Facts, PlainRule, candidates, plain_rules

Outcome = Literal['settled', 'several', 'unexplained', 'degenerate']

_NAMES = tuple(field.name for field in dataclasses.fields(Facts))
# A fitted decay within this factor of the end of its range counts as being at the end.
_MARGIN = 10.0


@dataclasses.dataclass(frozen=True)
class Fact:
    """What a trace says about one property of the optimizer.

    Attributes:
      value: The answer, or None if it is not determined.
      possible: All answers that are not ruled out.
      status: Whether the trace determines the answer, the caller gave it, or neither.
      reason: Why the answer is not determined, or how certain it is.
      margin: The error of the best candidate with another answer; None if there is no other answer.
    """

    value: str | None
    possible: tuple[str, ...]
    status: Literal['determined', 'given', 'not determined']
    reason: str
    margin: float | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One combination of facts, and how well it explains a trace.

    Attributes:
      facts: The combination.
      error: The largest deviation of a step, in units of the largest error that rounding can cause.
      decay: The given or fitted value, as in the next three attributes.
      eps: In the squared unit of the gradient inside the root, in the gradient's unit outside it.
      momentum: Zero if there is none.
      weight_decay: Zero if there is none.
      dialects: The dialects that compute this combination: names in `rmsprop_jax.dialects`, and
        `optax`.
    """

    facts: Facts
    error: float
    decay: float
    eps: float
    momentum: float
    weight_decay: float
    dialects: tuple[str, ...]

    @property
    def described(self) -> str:
        """The facts in words."""
        return _in_words(dataclasses.asdict(self.facts))

    def __str__(self) -> str:
        values = (self.decay, self.eps, self.momentum, self.weight_decay)
        numbers = ' '.join(f'{x:<9.4g}' for x in values)
        return f'{self.error:<9.2g} {numbers} {self.described}'


@dataclasses.dataclass(frozen=True)
class Rival:
    """One optimizer that is not RMSProp, and how well it explains a trace.

    Attributes:
      facts: The optimizer.
      error: The largest deviation of a step, in units of the largest error that rounding can cause.
      rate: The fitted factor on the recorded learning rate; 1 for SGD with the recorded rate.
      momentum: Zero if there is none.
      weight_decay: Zero if there is none.
    """

    facts: PlainRule
    error: float
    rate: float
    momentum: float
    weight_decay: float

    def __str__(self) -> str:
        facts = dataclasses.asdict(self.facts)
        numbers = {'learning rate times': self.rate}
        numbers |= {'momentum': self.momentum} if self.momentum else {}
        numbers |= {'weight decay': self.weight_decay} if self.weight_decay else {}
        values = ', '.join(f'{name} {value:.4g}' for name, value in numbers.items())
        return f'{facts.pop("rule")} ({_in_words(facts)}; {values})'


@dataclasses.dataclass(frozen=True)
class Identification:
    """The result of `identify_dialect`; its `str` is a table and a verdict in words.

    Attributes:
      candidates: All candidates, best first.
      rivals: SGD and signSGD in all their forms, best first.
      facts: What the trace says about each property, by the names of `Facts`.
      problem: Why the trace determines nothing; empty if some candidate explains it.
      precision: The dtype to which the parameters are rounded.
      tolerance: The allowed relative error of the gradients; 0 if none was given.
    """

    candidates: tuple[Candidate, ...]
    rivals: tuple[Rival, ...]
    facts: Mapping[str, Fact]
    problem: str
    precision: str
    tolerance: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """The conclusion in one word.

        `'settled'`: one dialect remains (`keras` and `tf_keras`, which have the same rule, count as
        one), or each fact is determined, given or meaningless.
        `'several'`: several combinations remain.
        `'unexplained'`: neither RMSProp nor SGD nor signSGD explains the run.
        `'degenerate'`: the run is explained, but need not be RMSProp.
        """
        if self.problem:
            best = min(self.candidates[0].error, self.rivals[0].error)
            return 'degenerate' if best <= EXPLAINED else 'unexplained'
        open_facts = [f for f in self.facts.values() if not f.value and len(f.possible) > 1]
        rules = {RECORDS[name].twin or name for name in self.dialects}
        return 'several' if open_facts and len(rules) != 1 else 'settled'

    @property
    def survivors(self) -> tuple[Candidate, ...]:
        """The candidates that are not ruled out; none if the trace has a problem."""
        return () if self.problem else tuple(c for c in self.candidates if c.error <= RULED_OUT)

    @property
    def dialects(self) -> tuple[str, ...]:
        """The names of all dialects among the survivors."""
        return tuple(dict.fromkeys(name for c in self.survivors for name in c.dialects))

    @property
    def verdict(self) -> str:
        """The conclusion in words."""
        if self.problem:
            lines = [f'Nothing is determined: {self.problem}.']
            best = min((*self.candidates, *self.rivals), key=lambda c: c.error)
            if self.outcome == 'unexplained':
                name = best if isinstance(best, Rival) else f'RMSProp ({best.described})'
                lines.append(
                    f'The nearest candidate misses by {best.error:.2g} times the rounding: {name}.'
                )
            return '\n'.join(lines)
        lines = []
        for status in ('determined', 'given'):
            values = {n: f.value for n, f in self.facts.items() if f.status == status and f.value}
            lines += [f'{status.capitalize()}: {_in_words(values)}.'] if values else []
        margins = [f.margin for f in self.facts.values() if f.margin is not None]
        if margins:
            lines.append(f'Any other answer misses by {min(margins):.2g} times the rounding.')
        for name, fact in self.facts.items():
            if fact.status == 'not determined':
                lines.append(f'Not determined: {name.replace("_", " ")}, since {fact.reason}.')
        names = ', '.join(self.dialects) or 'none; rmsprop_jax.rmsprop has all options'
        return '\n'.join([*lines, f'Dialects that do this: {names}.'])

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; None stands for infinity, which JSON lacks."""

        def plain(c: Candidate | Rival) -> dict[str, Any]:
            return {**dataclasses.asdict(c), 'error': c.error if math.isfinite(c.error) else None}

        return {
            'outcome': self.outcome,
            'dialects': list(self.dialects),
            'problem': self.problem,
            'verdict': self.verdict,
            'precision': self.precision,
            'tolerance': self.tolerance,
            'facts': {name: dataclasses.asdict(fact) for name, fact in self.facts.items()},
            'candidates': [plain(c) for c in self.candidates],
            'rivals': [plain(c) for c in self.rivals],
        }

    def __str__(self) -> str:
        shown = self.candidates[: max(5, min(len(self.survivors), 12))]
        allowed = f'{self.precision} rounding'
        allowed += f' with a tolerance of {self.tolerance:g}' if self.tolerance else ''
        return '\n'.join(
            [
                f'Errors of {len(self.candidates)} candidates, best first. Up to {EXPLAINED:g}, '
                f'{allowed} explains them; above {RULED_OUT:g}, it does not:',
                'error     decay     eps       momentum  weight_decay',
                *map(str, shown),
                f'{self.rivals[0].error:<9.2g} not RMSProp: {self.rivals[0]}',
                '',
                self.verdict,
            ]
        )


def identify_dialect(
    trace: Trace | Mapping[str, Any] | str | Path,
    *,
    learning_rate: Any = None,
    decay: float | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    weight_decay: float | Literal['fit'] | None = None,
    tolerance: float | None = None,
) -> Identification:
    """Finds out which RMSProp made a recorded run.

    Every combination of facts (the place of epsilon, the start of the accumulator, the place of the
    learning rate, and so on) is replayed on the recorded gradients, with the hyperparameters that
    you give and fitted values for the others. A fact is determined only if all combinations that
    rounding does not rule out agree on it. The trace must begin with the optimizer's first step.

    Args:
      trace: A `Trace`, a mapping with its fields, or the path of an .npz file with the arrays
        `params/<name>` of shape (steps + 1, ...), `gradients/<name>` of shape (steps, ...),
        `learning_rate`, and scalars for the known hyperparameters. Pickles are not loaded.
      learning_rate: One number, or one per step. This and the next four arguments override the
        trace.
      decay: The weight of the past in the running averages. None takes the value from the trace; if
        the trace has none, the value is fitted. The same holds for `eps` and `momentum`.
      eps: Epsilon, in the framework's unit.
      momentum: Zero means none.
      weight_decay: A positive number, tried as coupled and as decoupled decay, or 'fit', which also
        fits the number. Without a value here or in the trace, it is assumed to be zero.
      tolerance: The relative error of the recorded gradients, in [0, 1), if it is larger than
        rounding: for example, `2**-9` for gradients recorded in bfloat16. None allows rounding
        only.

    Returns:
      An `Identification`: print it. Nothing is determined if plain SGD or signSGD, at any fixed
      multiple of the recorded rate, explains the run as well.

    Raises:
      ValueError: If arrays do not fit together, are not real and finite, or do not form a trace.
      OSError: If the file cannot be read.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from rmsprop_jax import dialects
      >>> from rmsprop_jax.identify import identify_dialect
      >>> params, rates = jnp.ones(20), jnp.array([0.1, 0.1, 0.1, 0.02, 0.02, 0.02])
      >>> tx = dialects.torch(lambda step: rates[step], alpha=0.9, eps=0.1, momentum=0.5)
      >>> state, seen, gradients = tx.init(params), [params], []
      >>> for step in range(6):
      ...     gradients.append(jnp.sin(jnp.arange(20.0) * (step + 1)))
      ...     updates, state = tx.update(gradients[-1], state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     seen.append(params)
      >>> found = identify_dialect({
      ...     'params': np.stack(seen), 'gradients': np.stack(gradients), 'learning_rate': rates
      ... })
      >>> found.dialects
      ('torch',)
      >>> print(found.facts['learning_rate'].value)
      after momentum
    """
    read = read_trace(trace)
    given = {'decay': decay, 'eps': eps, 'momentum': momentum, 'weight_decay': weight_decay}
    known = {}
    for name, value in given.items():
        value = getattr(read, name) if value is None else value
        if value is not None and not (name == 'weight_decay' and value == 'fit'):
            known[name] = _number(name, value)
        elif name == 'weight_decay' and value is None:
            known[name] = 0.0
    steps, precision = lay_out(read, read.learning_rate if learning_rate is None else learning_rate)
    noise = 0.0 if tolerance is None else _number('tolerance', tolerance)
    ranked, rivals = _ranked(steps, known, noise), _rivals(steps, known, noise)
    problem = (
        _silence(steps, known)
        or _degenerate(ranked, rivals[0], known)
        or _unexplained(steps, known, noise, ranked)
    )
    judged = {name: _judge(name, ranked, steps, known, problem) for name in _NAMES}
    return Identification(ranked, rivals, judged, problem, precision, noise)


def _ranked(steps: Steps, known: Mapping[str, float], noise: float) -> tuple[Candidate, ...]:
    facts = candidates(known.get('momentum'), known.get('weight_decay'))
    found = [
        Candidate(f, error, **values, dialects=_dialects(f))
        for f, (error, values) in zip(facts, fit(steps, known, facts, noise), strict=True)
    ]
    return tuple(sorted(found, key=lambda c: c.error))


def _rivals(steps: Steps, known: Mapping[str, float], noise: float) -> tuple[Rival, ...]:
    facts = plain_rules(known.get('momentum'), known.get('weight_decay'))
    found = [
        Rival(f, error, 1 / values['eps'], values['momentum'], values['weight_decay'])
        for f, (error, values) in zip(facts, fit(steps, known, facts, noise), strict=True)
    ]
    return tuple(sorted(found, key=lambda c: c.error))


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f'{name} must be a number, got {value!r}.') from None
    below = math.inf if name in ('eps', 'weight_decay') else 1.0
    if not 0 <= number < below:
        raise ValueError(f'{name} must be in [0, {below:g}), got {number}.')
    return number


def _dialects(facts: Facts) -> tuple[str, ...]:
    answers = dataclasses.asdict(facts)
    return tuple(
        name
        for name, dialect in RECORDS.items()
        if any(rule.allows(answers) for rule in dialect.rules)
    )


def _silence(steps: Steps, known: Mapping[str, float]) -> str:
    """Why the trace has too little information, or empty if it has enough."""
    if not steps.gradients.any():
        return 'all gradients are zero'
    if not steps.learning_rate.any():
        return 'the learning rate is zero'
    if np.count_nonzero(steps.gradients.any(axis=1) & (steps.learning_rate != 0)) == 1:
        return 'there is only one step, and the first step of Adam or AdaGrad fits RMSProp too'
    unknown = len(HYPERPARAMETERS) - len(known)
    if np.count_nonzero(steps.gradients) < unknown + 3:
        return f'so few numbers can be explained in many ways with {unknown} unknown values'
    return ''


def _degenerate(ranked: Sequence[Candidate], rival: Rival, known: Mapping[str, float]) -> str:
    """Why the run is explained but need not be RMSProp, or empty."""
    explained = [c for c in ranked if c.error <= EXPLAINED]
    if rival.error <= (RULED_OUT if explained else EXPLAINED):
        return (
            f'the run is {rival}, or cannot be told from it. This rule misses by '
            f'{rival.error:.2g} times the rounding, so the run shows nothing about RMSProp'
        )
    low, high = RANGES['decay'][0] * _MARGIN, 1 - (1 - RANGES['decay'][1]) * _MARGIN
    if 'decay' not in known and explained and not any(low < c.decay < high for c in explained):
        return (
            f'the run is explained only with a decay of {explained[0].decay:.7g}, the end of the '
            'range that is searched, where the accumulator is no longer a running average'
        )
    return ''


def _unexplained(
    steps: Steps, known: Mapping[str, float], noise: float, ranked: Sequence[Candidate]
) -> str:
    """Why no candidate explains the trace, or empty if one does."""
    if ranked[0].error <= EXPLAINED:
        return ''
    facts = [c.facts for c in ranked]
    if min(found.error for found in fit(steps, known, facts, noise, judged=1)) > RULED_OUT:
        return (
            'no candidate explains the first step. The trace does not begin with fresh '
            'accumulators, a given hyperparameter is wrong, weights decay (give weight_decay), '
            'or gradients were clipped or scaled after they were recorded'
        )
    return (
        'no candidate explains all steps, though some explain the first. A hyperparameter '
        'changed or was given wrongly, weights decay (give weight_decay), leaves are treated '
        'differently (identify them one by one), or something else changes the parameters'
    )


def _judge(
    name: str,
    ranked: Sequence[Candidate],
    steps: Steps,
    known: Mapping[str, float],
    problem: str,
) -> Fact:
    answers = {c: getattr(c.facts, name) for c in ranked}
    everything = tuple(dict.fromkeys(answers.values()))
    if problem:
        return Fact(None, everything, 'not determined', problem)
    possible = tuple(dict.fromkeys(a for c, a in answers.items() if c.error <= RULED_OUT))
    if possible == ('no momentum',):
        return Fact(None, possible, 'not determined', 'there is no momentum')
    if len(possible) > 1:
        return Fact(None, possible, 'not determined', _why(name, steps, known))
    answer = next(iter(possible))
    if len(everything) == 1:
        return Fact(answer, possible, 'given', 'it follows from what was given')
    margin = min(c.error for c, other in answers.items() if other != answer)
    reason = f'any other answer misses by {margin:.2g} times the rounding'
    return Fact(answer, possible, 'determined', reason, margin)


def _why(name: str, steps: Steps, known: Mapping[str, float]) -> str:
    """Why several answers about `name` explain a trace."""
    rates = steps.learning_rate
    if name == 'learning_rate' and not np.ptp(rates):
        return 'the learning rate is constant'
    if name == 'learning_rate' and 'momentum' not in known and _geometric(rates):
        return (
            'a learning rate that changes by the same factor at every step looks like another '
            'momentum; give the momentum'
        )
    if name == 'epsilon':
        return 'epsilon is too small compared with the gradients, or there are too few steps'
    return 'several answers explain the trace'


def _geometric(rates: np.ndarray) -> bool:
    return bool(np.all(rates)) and bool(np.ptp(rates[1:] / rates[:-1]) < 1e-6)


def _in_words(facts: Mapping[str, str | None]) -> str:
    words = {
        'epsilon': 'epsilon {}',
        'start': 'accumulator starts at {}',
        'learning_rate': 'learning rate {}',
        'weight_decay': 'weight decay {}',
    }
    flags = {
        ('bias_correction', 'no'): '',
        ('bias_correction', 'yes'): 'bias-corrected',
        ('centered', 'no'): 'not centered',
        ('centered', 'yes'): 'centered',
        ('momentum', 'none'): 'no momentum',
        ('momentum', 'heavy ball'): 'momentum',
        ('momentum', 'Nesterov'): 'Nesterov momentum',
        ('learning_rate', 'no momentum'): '',
        ('weight_decay', 'none'): 'no weight decay',
    }
    parts = [
        flags.get((name, value or ''), words.get(name, '').format(value))
        for name, value in facts.items()
    ]
    return '; '.join(part for part in parts if part)
