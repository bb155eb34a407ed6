"""Every checkpoint source with every transformation that has the moments.

What `from_*` accepts goes on as the source would have, and the rest is refused by name. There is no
third outcome.

Transformations, states, settings and contradictions between them are drawn. What would have been is
an independent loop of the source's equations, in NumPy and float64, from its own state. What a
source does not say of itself (Keras, TensorFlow and Optax keep no decay, epsilon or momentum in
their states) is taken to be what the transformation was given.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from measuring import measured_once

import rmsprop_jax
from rmsprop_jax import dialects, interchange

pytestmark = pytest.mark.extended

SHAPES = {'a': (2,), 'b': (3, 2)}
PAIRS = [interchange.Pair(name, name) for name in SHAPES]
STEPS = 4
Draw = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What an optimizer is given, by name of the parameter where groups may differ."""

    rates: dict[str, float]
    decay: float = 0.9
    eps: float = 1e-3
    momentum: float = 0.0
    centered: bool = False
    schedule: str = 'constant'
    weight_decay: float = 0.0
    maximize: bool = False
    corrected: bool = False

    def rate(self, name: str, count: Any) -> Any:
        """At a step, of a schedule or none."""
        shape = {'constant': 1.0, 'line': 1.0 - 0.002 * count, 'drop': 1.0 - 0.5 * (count >= 9)}
        return self.rates[name] * shape[self.schedule]


def schedule_of(x: Numbers, name: str) -> Any:
    return x.rates[name] if x.schedule == 'constant' else functools.partial(x.rate, name)


# The transformations.


def _torch_like(dialect: Any, **more: Any) -> Callable[[Numbers, Any], Any]:
    def make(x: Numbers, lr: Any) -> Any:
        extra = more | ({'maximize': x.maximize} if dialect is dialects.torch else {})
        return dialect(lr, x.decay, x.eps, x.weight_decay, x.momentum, x.centered, **extra)

    return make


def _foreign(eps_in_sqrt: bool, before: bool, split: bool = False) -> Callable[[Numbers, Any], Any]:
    def make(x: Numbers, lr: Any) -> Any:
        rate = optax.scale_by_learning_rate(lr)
        parts = [optax.trace(x.momentum)] if x.momentum else []
        parts = [rate, *parts] if before else [*parts, rate]
        if split:
            parts = [optax.scale(4.0), *parts, optax.scale(0.25)]
        root = rmsprop_jax.scale_by_rms(
            x.decay, x.eps, eps_in_sqrt=eps_in_sqrt, centered=x.centered
        )
        return optax.chain(optax.scale(-1.0 if x.maximize else 1.0), root, *parts)

    return make


TARGETS: dict[str, Callable[[Numbers, Any], Any]] = {
    'torch': _torch_like(dialects.torch),
    'timm': _torch_like(dialects.timm),
    'timm outside': _torch_like(dialects.timm, lr_in_momentum=False),
    'timm decoupled': _torch_like(dialects.timm, decoupled_decay=True),
    'stable_baselines3': _torch_like(dialects.stable_baselines3),
    'keras': lambda x, lr: dialects.keras(
        lr, x.decay, x.momentum, x.eps, x.centered, x.weight_decay or None
    ),
    'keras_legacy': lambda x, lr: dialects.keras_legacy(lr, x.decay, x.momentum, x.eps, x.centered),
    'tensorflow': lambda x, lr: dialects.tensorflow(
        lr, x.decay, x.momentum, x.eps, centered=x.centered
    ),
    'mxnet': lambda x, lr: dialects.mxnet(
        lr, x.decay, x.momentum, x.eps, x.centered, wd=x.weight_decay
    ),
    'graves': lambda x, lr: dialects.graves(lr, x.decay, x.momentum, x.eps),
    'rmsprop': lambda x, lr: rmsprop_jax.rmsprop(
        lr,
        x.decay,
        x.eps,
        centered=x.centered,
        momentum=x.momentum or None,
        bias_correction=x.corrected,
    ),
    'optax.rmsprop': lambda x, lr: optax.rmsprop(
        lr, x.decay, x.eps, centered=x.centered, momentum=x.momentum or None
    ),
    'rms, trace, rate': _foreign(eps_in_sqrt=False, before=False),
    'rms, rate, trace': _foreign(eps_in_sqrt=False, before=True),
    'rms, trace, rate, inside': _foreign(eps_in_sqrt=True, before=False),
    'rms, 4, trace, rate, 1/4': _foreign(eps_in_sqrt=True, before=False, split=True),
}
WRAPPERS = ('plain', 'plain', 'groups', 'masked', 'finite', 'inject')


@dataclasses.dataclass(frozen=True)
class Target:
    """A transformation, and what it was given."""

    name: str
    wrapper: str
    numbers: Numbers
    tx: Any
    run: Any

    @property
    def outside_root(self) -> bool:
        """Whether epsilon is, as far as this table knows."""
        x = self.numbers
        return (
            self.name in ('torch', 'rms, trace, rate', 'rms, rate, trace')
            or (self.name == 'keras_legacy' and not x.momentum)
            or (self.name == 'mxnet' and not x.centered)
        )

    @property
    def decouples(self) -> bool:
        """Whether weights decay apart from the gradient."""
        return self.name in ('keras', 'timm decoupled')

    @property
    def decays(self) -> bool:
        """Whether it can."""
        coupled = ('torch', 'timm', 'timm outside', 'stable_baselines3', 'mxnet')
        return self.decouples or self.name in coupled


def drawn_target(draw: Draw) -> Target:
    name, wrapper = str(draw.choice(list(TARGETS))), str(draw.choice(WRAPPERS))
    first = float(draw.choice([0.01, 0.1, 1.0]))
    x = Numbers(
        rates={'a': first, 'b': 0.5 * first if wrapper == 'groups' else first},
        decay=float(draw.choice([0.9, 0.99])),
        eps=float(draw.choice([1e-3, 1e-8])),
        momentum=float(draw.choice([0.0, 0.5, 0.9], p=[0.3, 0.3, 0.4])),
        centered=bool(draw.random() < 0.3) or name == 'graves',
        schedule=str(draw.choice(['constant', 'line', 'drop'], p=[0.6, 0.2, 0.2])),
        weight_decay=float(draw.choice([0.0, 0.02], p=[0.7, 0.3])),
        maximize=bool(name in ('torch', 'rms, rate, trace') and draw.random() < 0.3),
        corrected=bool(name == 'rmsprop' and draw.random() < 0.3),
    )
    tx = _wrapped(wrapper, TARGETS[name], x)

    @jax.jit
    def run(params: Any, state: Any, gradients: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            updates, after = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), after), None

        return jax.lax.scan(step, (params, state), gradients)[0][0]

    return Target(name, wrapper, x, tx, run)


def _wrapped(wrapper: str, make: Callable[[Numbers, Any], Any], x: Numbers) -> Any:
    each = {name: make(x, schedule_of(x, name)) for name in SHAPES}
    if wrapper == 'groups':
        return optax.partition(each, {name: name for name in SHAPES})
    if wrapper == 'masked':
        return optax.masked(each['a'], True)
    if wrapper == 'finite':
        return optax.apply_if_finite(each['a'], 3)
    if wrapper == 'inject':
        return rmsprop_jax.inject_hyperparams(lambda lr: make(x, lr))(schedule_of(x, 'a'))
    return each['a']


# The sources.


@dataclasses.dataclass(frozen=True)
class Source:
    """A framework's rule.

    Attributes:
      inside: Whether the learning rate goes into the velocity.
      eps_in_sqrt: Where epsilon is, with momentum and without.
      bring: Makes a checkpoint of moments and converts it.
      says: Whether its numbers are in the checkpoint, so that they can be compared.
    """

    inside: bool
    eps_in_sqrt: tuple[bool, bool]
    bring: Callable[..., Any]
    says: bool = True


def _from_torch(**marks: Any) -> Callable[..., Any]:
    def bring(target: Target, x: Numbers, moments: Any, count: int, params: Any) -> Any:
        slots = {'nu': 'square_avg', 'mu': 'grad_avg', 'trace': 'momentum_buffer'}
        entries = [
            {'step': count, **{slots[k]: column[name] for k, column in moments.items()}}
            for name in SHAPES
        ]
        groups = [
            {
                'lr': x.rate(name, count),
                'alpha': x.decay,
                'eps': x.eps,
                'weight_decay': x.weight_decay,
                'momentum': x.momentum,
                'centered': x.centered,
                'params': [i],
                'param_names': [name],
                **marks,
                **({'maximize': x.maximize} if 'maximize' in marks else {}),
            }
            for i, name in enumerate(SHAPES)
        ]
        theirs = {'state': dict(enumerate(entries)), 'param_groups': groups}
        dialect = None if marks else dialects.stable_baselines3
        return interchange.from_torch(theirs, target.tx, params, PAIRS, dialect=dialect)

    return bring


def _from_keras(target: Target, x: Numbers, moments: Any, count: int, params: Any) -> Any:
    slots = {'nu': 'velocity', 'mu': 'average_gradient', 'trace': 'momentum'}
    theirs = {
        f'{name}_{slots[k]}': column[name] for k, column in moments.items() for name in SHAPES
    }
    if x.schedule == 'constant':
        theirs['learning_rate'] = np.float64(x.rate('a', count))
    theirs['iteration'] = np.int64(count)
    return interchange.from_keras(theirs, target.tx, params, PAIRS)


def _from_tensorflow(target: Target, x: Numbers, moments: Any, count: int, params: Any) -> Any:
    slots = {'nu': 'rms', 'mu': 'mg', 'trace': 'momentum'}
    theirs = {
        f'{name}/{slots[k]}': column[name] for k, column in moments.items() for name in SHAPES
    }
    return interchange.from_tensorflow(
        theirs, target.tx, params, PAIRS, name=None, count=count, centered=x.centered
    )


def _from_optax(
    target: Target, x: Numbers, moments: Any, count: int, params: Any, given: bool = False
) -> Any:
    source = optax.rmsprop(
        schedule_of(x, 'a'),
        x.decay,
        x.eps,
        centered=x.centered,
        momentum=x.momentum or None,
        bias_correction=x.corrected,
    )
    theirs = source.init(params)
    columns = {k: {n: jnp.asarray(v) for n, v in column.items()} for k, column in moments.items()}
    if 'trace' in columns:
        columns['trace'] = jax.tree.map(jnp.negative, columns['trace'])

    def fill(node: Any) -> Any:
        fields = {k: v for k, v in columns.items() if k in node._fields}
        counts = {'count': jnp.int32(count)} if 'count' in node._fields else {}
        return node._replace(**fields, **counts)

    theirs = jax.tree.map(fill, theirs, is_leaf=lambda n: hasattr(n, '_fields'))
    decay = x.decay if x.corrected else None
    return interchange.from_optax(
        theirs, target.tx, params, source=source if given else None, decay=decay, count=count
    )


TIMM = {'decoupled_decay': False, 'lr_in_momentum': True, 'caution': False}
SOURCES = {
    'torch': Source(False, (False, False), _from_torch(maximize=False, foreach=None)),
    'timm': Source(True, (True, True), _from_torch(**TIMM)),
    'timm outside': Source(False, (True, True), _from_torch(**TIMM | {'lr_in_momentum': False})),
    'stable_baselines3': Source(False, (True, True), _from_torch()),
    'keras': Source(True, (True, True), _from_keras, says=False),
    'keras_legacy': Source(True, (True, False), _from_tensorflow, says=False),
    'tensorflow': Source(True, (True, True), _from_tensorflow, says=False),
    'optax': Source(True, (True, True), _from_optax, says=False),
    'optax, at hand': Source(True, (True, True), functools.partial(_from_optax, given=True)),
}
# What a checkpoint may say otherwise than the transformation has it.
CONTRADICTIONS: tuple[dict[str, Any], ...] = (
    {'decay': 0.95},
    {'eps': 1e-5},
    {'momentum': 0.7},
    {'momentum': 0.0},
    {'weight_decay': 0.1},
    {'maximize': True},
    {'centered': True},
    {'rates': {'a': 0.03, 'b': 0.03}},
)


def continued(
    source: Source, target: Target, x: Numbers, moments: Any, count: int, params: Any, gs: Any
) -> dict[str, np.ndarray]:
    """Where the source's equations lead. What it does not say is as the target has it."""
    ends: dict[str, np.ndarray] = {}
    inside_root = source.eps_in_sqrt[not x.momentum]
    if source is SOURCES['optax']:
        inside_root = not target.outside_root
    decouples = not source.says and target.decouples
    for name, start in params.items():
        p = np.array(start)
        nu, mu, b = (np.array(moments[k][name]) if k in moments else 0.0 for k in MOMENTS)
        for i, gradient in enumerate(gs[name]):
            g, lr = -gradient if x.maximize else gradient, x.rate(name, count + i)
            if decouples:
                p = p - lr * x.weight_decay * p
            else:
                g = g + x.weight_decay * p
            nu = x.decay * nu + (1 - x.decay) * g**2
            mu = x.decay * mu + (1 - x.decay) * g
            c = 1 - x.decay ** (count + i + 1) if x.corrected else 1.0
            square = nu / c - (mu / c) ** 2 * x.centered
            u = g / (np.sqrt(square + x.eps) if inside_root else np.sqrt(square) + x.eps)
            b = x.momentum * b + (lr * u if source.inside else u)
            p = p - (b if source.inside else lr * b)
        ends[name] = p
    return ends


MOMENTS = ('nu', 'mu', 'trace')


def drawn_numbers(target: Target, label: str, draw: Draw) -> Numbers:
    """What the source has been given: the same, as far as it has it, or a contradiction."""
    source, x = SOURCES[label], target.numbers
    if source.says and draw.random() < 0.2:
        x = dataclasses.replace(x, **CONTRADICTIONS[draw.integers(len(CONTRADICTIONS))])
    elif label == 'keras' and x.schedule == 'constant' and draw.random() < 0.2:
        x = dataclasses.replace(x, rates={'a': 0.03, 'b': 0.03})
    return dataclasses.replace(
        x,
        maximize=x.maximize and label in ('torch', 'optax'),
        corrected=x.corrected and 'optax' in label,
        weight_decay=x.weight_decay if _decays(target, label) else 0.0,
    )


def _decays(target: Target, label: str) -> bool:
    if SOURCES[label].says:
        return label != 'optax, at hand'
    return target.decays


def outcome(target: Target, label: str, draw: Draw) -> str:
    """'equal' or 'refused' of one drawn checkpoint, or an AssertionError."""
    source, count = SOURCES[label], int(draw.choice([7, 200]))
    x = drawn_numbers(target, label, draw)
    means = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
    moments = {'nu': {k: m**2 + draw.uniform(0.1, 1, m.shape) for k, m in means.items()}}
    if x.centered:
        moments['mu'] = means
    if x.momentum or label == 'tensorflow':
        moments['trace'] = {k: draw.normal(size=shape) for k, shape in SHAPES.items()}
    params = {k: jnp.asarray(draw.normal(size=shape)) for k, shape in SHAPES.items()}
    gs = {k: draw.normal(size=(STEPS, *shape)) for k, shape in SHAPES.items()}
    try:
        state = source.bring(target, x, moments, count, params)
    except interchange.InterchangeError:
        return 'refused'
    found = target.run(params, state, jax.tree.map(jnp.asarray, gs))
    for name, end in continued(source, target, x, moments, count, params, gs).items():
        moved = abs(end - np.asarray(params[name])).max()
        message = f'{label} -> {target.wrapper} {target.name}: {x} for {target.numbers}'
        np.testing.assert_allclose(found[name], end, rtol=0, atol=1e-6 * moved, err_msg=message)
    return 'equal'


def _all_outcomes(seed: int, targets: int, each: int) -> collections.Counter[tuple[str, str]]:
    draw = np.random.default_rng(seed)
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    with jax.enable_x64(True), measured_once({}):
        for _ in range(targets):
            target = drawn_target(draw)
            for label in SOURCES:
                found.update((label, outcome(target, label, draw)) for _ in range(each))
    return found


def test_a_checkpoint_goes_on_as_it_would_have_or_is_refused():
    found = _all_outcomes(seed=14, targets=18, each=1)
    assert sum(found.values()) == 162
    assert sum(n for (_, how), n in found.items() if how == 'equal') > 25


@pytest.mark.slow
def test_ten_thousand_checkpoints_go_on_as_they_would_have_or_are_refused():
    found = _all_outcomes(seed=2026, targets=280, each=4)
    assert sum(found.values()) == 10_080
    for label in SOURCES:
        assert found[label, 'equal'] > 100, label
        assert found[label, 'refused'] > 100, label
