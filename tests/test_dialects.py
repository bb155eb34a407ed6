"""The dialects among themselves, against their equations, and as part of JAX.

That each equals its framework is the business of test_golden.py.
"""

import dataclasses
import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden.configurations import RATE, declared, golden_configurations, halving
from golden.problems import flat, problem, recorded_steps
from jax.example_libraries import optimizers

import rmsprop_jax
from rmsprop_jax import dialects, rmsprop, storage
from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.dialects._other_frameworks import EQUIVALENTS
from rmsprop_jax.dialects._record import RECORDS, functions

GOLDEN = Path(__file__).parent / 'golden'
CONFIGURATIONS = {c['name']: c for c in golden_configurations()}
DIALECTS = functions()
# The same numbers for all; a few steps of gradients that are neither large nor small.
PROBLEM = problem({'seed': 3, 'problem': 'normal', 'steps': 12, 'dtype': 'float64'})


def run(tx: Any, jit: bool = True, given: Any = PROBLEM) -> np.ndarray:
    """The parameters after every step, in the precision that is switched on."""
    given = jax.tree.map(jnp.asarray, given)
    steps = functools.partial(steps_of, tx, scan=jit)
    return stacked((jax.jit(steps) if jit else steps)(given))


def steps_of(tx: Any, given: Any, scan: bool = True) -> Any:
    """The parameters after every step, as a tree of arrays with an axis of steps."""

    def step(carry: Any, gradients: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    carry, trees = (given.params, tx.init(given.params)), []
    if scan:
        return jax.lax.scan(step, carry, given.gradients)[1]
    for t in range(len(jax.tree.leaves(given.gradients)[0])):
        carry, after = step(carry, {n: g[t] for n, g in given.gradients.items()})
        trees.append(after)
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def stacked(trees: Any) -> np.ndarray:
    count = len(jax.tree.leaves(trees)[0])
    return np.stack([flat({n: np.asarray(x[t]) for n, x in trees.items()}) for t in range(count)])


RUNS: dict[tuple[str, str], np.ndarray] = {}


def run_once(name: str, key: str, **options: Any) -> np.ndarray:
    """`run` of a dialect in float64, remembered: many tests start from the same one."""
    if (name, key) not in RUNS:
        RUNS[name, key] = run(DIALECTS[name](**options))
    return RUNS[name, key]


def assert_same(one: Any, other: Any) -> None:
    """The same arithmetic in another order: 1e-16 for each of few steps."""
    with jax.enable_x64(True):
        np.testing.assert_allclose(run(one), run(other), rtol=1e-13, atol=1e-14)


def assert_other(one: Any, other: Any) -> None:
    """Not the same by much more than rounding."""
    with jax.enable_x64(True):
        assert np.abs(run(one) - run(other)).max() > 1e-5


# --- Dialects that are one another ----------------------------------------------------------------

SAME = {
    'timm is TensorFlow 1': lambda: (
        dialects.timm(halving, momentum=0.9, centered=True),
        dialects.tensorflow(halving, momentum=0.9, centered=True),
    ),
    'timm without momentum is TensorFlow 1': lambda: (
        dialects.timm(halving),
        dialects.tensorflow(halving),
    ),
    'timm with the rate outside is Stable-Baselines3': lambda: (
        dialects.timm(halving, momentum=0.9, lr_in_momentum=False, weight_decay=0.1),
        dialects.stable_baselines3(halving, 0.9, 1e-10, momentum=0.9, weight_decay=0.1),
    ),
    'Keras is the default but for epsilon': lambda: (
        dialects.keras(halving),
        rmsprop(halving, eps=1e-7),
    ),
    'Keras with everything of ours': lambda: (
        dialects.keras(halving, 0.95, 0.5, 1e-3, True, 0.1),
        rmsprop(halving, 0.95, 1e-3, momentum=0.5, centered=True, weight_decay=0.1),
    ),
    'tf_keras is Keras but for the average of weights': lambda: (
        dialects.tf_keras(halving, 0.95, 0.5, 1e-3, True, 0.1, global_clipnorm=1.0),
        dialects.keras(halving, 0.95, 0.5, 1e-3, True, 0.1, global_clipnorm=1.0),
    ),
    'tf_keras clips by one norm': lambda: (
        dialects.tf_keras(RATE, clipnorm=0.5, clipvalue=0.1),
        dialects.keras(RATE, clipnorm=0.5),
    ),
    'tf_keras clips by value where a norm of zero means none': lambda: (
        dialects.tf_keras(RATE, global_clipnorm=0.0, clipvalue=0.1),
        dialects.keras(RATE, clipvalue=0.1),
    ),
    'tf_keras takes a frequency of zero for never': lambda: (
        dialects.tf_keras(RATE, use_ema=True, ema_overwrite_frequency=0),
        dialects.tf_keras(RATE, use_ema=True, ema_overwrite_frequency=None),
    ),
    'legacy Keras with momentum is Keras': lambda: (
        dialects.keras_legacy(halving, momentum=0.9, epsilon=0.01),
        dialects.keras(halving, momentum=0.9, epsilon=0.01),
    ),
    'legacy Keras without momentum has epsilon outside': lambda: (
        dialects.keras_legacy(halving, epsilon=0.01),
        dialects.torch(halving, 0.9, 0.01),
    ),
    'a constant rate may be inside or outside': lambda: (
        dialects.torch(RATE, momentum=0.9),
        rmsprop(RATE, 0.99, eps_in_sqrt=False, momentum=0.9),
    ),
    'MXNet 2 is PyTorch': lambda: (dialects.mxnet(halving), dialects.torch(halving, 0.9)),
    'MXNet 1 is the default': lambda: (dialects.mxnet1(halving), rmsprop(halving)),
    'both MXNets are Graves when centered': lambda: (
        dialects.mxnet(halving, 0.95, 0.9, 1e-4, centered=True),
        dialects.graves(halving),
    ),
    'and so is the older': lambda: (
        dialects.mxnet1(halving, 0.95, 0.9, 1e-4, centered=True),
        dialects.graves(halving),
    ),
    'Hinton has no epsilon': lambda: (dialects.hinton(halving), rmsprop(halving, eps=0.0)),
    'maximizing is descending on the negative': lambda: (
        dialects.torch(halving, maximize=True),
        optax.chain(optax.scale(-1.0), dialects.torch(halving)),
    ),
    'a negative gradient in pieces': lambda: (
        dialects.keras(RATE, loss_scale_factor=4.0),
        optax.chain(optax.scale(0.25), dialects.keras(RATE)),
    ),
}
DIFFERENT = {
    'a changing rate inside or outside': lambda: (
        dialects.torch(halving, momentum=0.9),
        rmsprop(halving, 0.99, eps_in_sqrt=False, momentum=0.9),
    ),
    'epsilon inside or outside': lambda: (dialects.mxnet(RATE), dialects.mxnet1(RATE)),
    'wd before or after clipping': lambda: (
        dialects.mxnet(RATE, centered=True, wd=1.0, clip_gradient=0.5),
        dialects.mxnet1(RATE, centered=True, wd=1.0, clip_gradient=0.5),
    ),
    'a start at one or zero': lambda: (
        dialects.tensorflow(RATE),
        dialects.keras(RATE, epsilon=1e-10),
    ),
    'legacy epsilon inside or outside': lambda: (
        dialects.keras_legacy(RATE, epsilon=0.01),
        dialects.keras(RATE, epsilon=0.01),
    ),
    'the norm plus 1e-6 or not': lambda: (
        optax.chain(dialects.torch_clip_grad_norm(5.0), optax.sgd(1.0)),
        optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(1.0)),
    ),
}


@pytest.mark.extended
@pytest.mark.parametrize('name', SAME)
def test_same(name):
    assert_same(*SAME[name]())


@pytest.mark.extended
@pytest.mark.parametrize('name', DIFFERENT)
def test_different(name):
    one, other = DIFFERENT[name]()
    threshold = 1e-7 if '1e-6' in name else 1e-5
    with jax.enable_x64(True):
        assert np.abs(run(one) - run(other)).max() > threshold


# --- Equations, in plain NumPy --------------------------------------------------------------------


@dataclasses.dataclass
class Memory:
    """What a rule remembers of one array."""

    n: Any = 0.0
    m: Any = 0.0
    b: Any = 0.0


Rule = Callable[[np.ndarray, np.ndarray, Memory, float], np.ndarray]


def loop(rule: Rule, rates: Callable[[int], float] = halving) -> np.ndarray:
    """The parameters after every step of a rule, which maps (p, g, memory, rate) to p."""
    params = {n: p.copy() for n, p in PROBLEM.params.items()}
    memory = {n: Memory(*(np.zeros_like(p) for _ in range(3))) for n, p in params.items()}
    rows = []
    for t in range(12):
        for name, g in PROBLEM.gradients.items():
            params[name] = rule(params[name], g[t], memory[name], rates(t))
        rows.append(flat(params))
    return np.stack(rows)


def graves_rule(p: Any, g: Any, s: Memory, rate: float) -> Any:
    s.n = 0.95 * s.n + 0.05 * g**2
    s.m = 0.95 * s.m + 0.05 * g
    s.b = 0.9 * s.b - rate * g / np.sqrt(s.n - s.m**2 + 1e-4)
    return p + s.b


def hinton_rule(p: Any, g: Any, s: Memory, rate: float) -> Any:
    s.n = 0.9 * s.n + 0.1 * g**2
    root = np.sqrt(s.n)
    return p - rate * np.where(root == 0, 0, g / np.where(root == 0, 1, root))


def mxnet_rule(p: Any, g: Any, s: Memory, rate: float) -> Any:
    g = np.clip(0.25 * g, -0.5, 0.5) + 0.3 * p
    s.n = 0.8 * s.n + 0.2 * g**2
    return np.clip(p - rate * g / (np.sqrt(s.n) + 0.01), -1.2, 1.2)


def mxnet_centered_rule(p: Any, g: Any, s: Memory, rate: float) -> Any:
    g = np.clip(0.25 * g, -0.5, 0.5) + 0.3 * p
    return np.clip(_alex(p, g, s, rate), -1.2, 1.2)


def mxnet1_rule(p: Any, g: Any, s: Memory, rate: float) -> Any:
    g = np.clip(0.25 * g + 0.3 * p, -0.5, 0.5)
    s.n = 0.8 * s.n + 0.2 * g**2
    return np.clip(p - rate * g / np.sqrt(s.n + 0.01), -1.2, 1.2)


def mxnet1_centered_rule(p: Any, g: Any, s: Memory, rate: float) -> Any:
    g = np.clip(0.25 * g + 0.3 * p, -0.5, 0.5)
    return np.clip(_alex(p, g, s, rate), -1.2, 1.2)


def _alex(p: Any, g: Any, s: Memory, rate: float) -> Any:
    s.n = 0.8 * s.n + 0.2 * g**2
    s.m = 0.8 * s.m + 0.2 * g
    s.b = 0.7 * s.b - rate * g / np.sqrt(s.n - s.m**2 + 0.01)
    return p + s.b


_CLIPS: dict[str, Any] = {'wd': 0.3, 'rescale_grad': 0.25, 'clip_gradient': 0.5}
_NUMBERS: tuple[Any, ...] = (halving, 0.8, 0.7, 0.01)
EQUATIONS: dict[str, tuple[Rule, Callable[[], Any]]] = {
    'graves': (graves_rule, lambda: dialects.graves(halving)),
    'hinton': (hinton_rule, lambda: dialects.hinton(halving)),
    'mxnet': (mxnet_rule, lambda: dialects.mxnet(*_NUMBERS, False, 1.2, **_CLIPS)),
    'mxnet centered': (
        mxnet_centered_rule,
        lambda: dialects.mxnet(*_NUMBERS, True, 1.2, **_CLIPS),
    ),
    'mxnet1': (mxnet1_rule, lambda: dialects.mxnet1(*_NUMBERS, False, 1.2, **_CLIPS)),
    'mxnet1 centered': (
        mxnet1_centered_rule,
        lambda: dialects.mxnet1(*_NUMBERS, True, 1.2, **_CLIPS),
    ),
}


@pytest.mark.parametrize('name', EQUATIONS)
def test_equations(name):
    rule, make = EQUATIONS[name]
    with jax.enable_x64(True):
        # 12 steps round by 1e-16 each; the loops subtract to find a variance.
        np.testing.assert_allclose(run(make()), loop(rule), rtol=1e-12, atol=1e-13)


# --- Arguments ------------------------------------------------------------------------------------


@functools.cache
def signatures() -> dict[str, dict[str, str]]:
    """The frameworks' arguments and defaults, as their recorders found them."""
    found = {}
    for path in GOLDEN.glob('*.npz'):
        with np.load(path) as file:
            found |= json.loads(str(file['about']))['signatures']
    return found


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(dialects, name)).parameters)


WITH_SIGNATURE = sorted([*(n for n in DIALECTS if RECORDS[n].recorded), 'torch_clip_grad_norm'])


@pytest.mark.parametrize('name', WITH_SIGNATURE)
def test_every_argument_is_taken_or_refused(name):
    ours, theirs = parameters(name), signatures()[name]
    needed = {n: 1.0 for n, p in ours.items() if p.default is p.empty}
    for argument in theirs.keys() - ours.keys() - {'parameters'}:
        with pytest.raises(TypeError, match=f'{name} has no argument .{argument}.: .{{8,}}'):
            DIALECTS.get(name, dialects.torch_clip_grad_norm)(**needed, **{argument: None})
    # What is only ours comes by keyword.
    for argument in ours.keys() - theirs.keys():
        assert ours[argument].kind == inspect.Parameter.KEYWORD_ONLY, argument


@pytest.mark.parametrize('name', ['mxnet'])
def test_former_names_are_refused(name):
    for old, new in (('gamma1', 'rho'), ('gamma2', 'momentum')):
        with pytest.raises(TypeError, match=f'no argument .{old}.: use {new}'):
            DIALECTS[name](**{old: 0.9})


@pytest.mark.parametrize('name', WITH_SIGNATURE)
def test_arguments_have_the_order_and_defaults_of_the_framework(name):
    ours, theirs = parameters(name), signatures()[name]
    places = [n for n, p in ours.items() if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(theirs)[: len(places)] == places
    for argument in ours.keys() & theirs.keys():
        default, recorded = ours[argument].default, theirs[argument]
        if recorded == 'in kwargs':
            continue
        if default is inspect.Parameter.empty:
            assert recorded == 'required', argument
        elif isinstance(default, bool) or default is None:
            assert recorded == repr(default), argument
        else:
            assert float(recorded) == default, argument


# For each argument, a value that is not the default, and what else it needs to matter. Those that
# only one framework has are beside its configurations.
_EMA: dict[str, Any] = {'use_ema': True, 'ema_overwrite_frequency': 2}
_ONLY_MATRIX = {'matrix': True, 'vector': False, 'scalar': False}
COMMON: dict[str, tuple[Any, dict[str, Any]]] = {
    **dict.fromkeys(('lr', 'learning_rate'), (0.1, {})),
    **dict.fromkeys(('alpha', 'rho', 'decay', 'gamma1'), (0.5, {})),
    **dict.fromkeys(('eps', 'epsilon'), (0.1, {})),
    **dict.fromkeys(('weight_decay', 'wd'), (0.1, {})),
    **dict.fromkeys(('clipnorm', 'clipvalue', 'global_clipnorm'), (0.1, {})),
    'momentum': (0.5, {}),
    'centered': (True, {}),
    'maximize': (True, {}),
    'use_ema': (True, {'ema_overwrite_frequency': 2}),
    'ema_momentum': (0.5, _EMA),
    'ema_overwrite_frequency': (3, {'use_ema': True}),
    'sparse': (True, {'momentum': 0.9}),
    'storage': (storage.large_leaves(storage.bfloat16(), 1, 0), {}),
}


def changes(name: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The change of each argument of a dialect that has one."""
    decaying = {n: 0.1 for n in ('weight_decay', 'wd') if n in parameters(name)}
    known = {**COMMON, 'mask': (_ONLY_MATRIX, decaying), **declared('CHANGES').get(name, {})}
    return {n: known[n] for n in parameters(name) if n in known}


CHANGES = {name: changes(name) for name in DIALECTS}
CHANGED = [(name, argument) for name, changes in CHANGES.items() for argument in changes]


def test_every_argument_of_every_dialect_is_changed_below():
    assert {name: set(parameters(name)) for name in DIALECTS} == {
        name: set(changes) for name, changes in CHANGES.items()
    }


@pytest.mark.extended
@pytest.mark.parametrize(('name', 'argument'), CHANGED)
def test_every_argument_matters(name, argument):
    value, needs = CHANGES[name][argument]
    rate = 'lr' if 'lr' in parameters(name) else 'learning_rate'
    options = {rate: RATE} | needs
    changed = DIALECTS[name](**options | {argument: value})
    with jax.enable_x64(True):
        # Without jit, most changed numbers need no new program.
        after, before = run(changed, jit=False), run_once(name, repr(options), **options)
        assert np.abs(after - before).max() > 1e-5


DECOUPLED: dict[str, Any] = {'weight_decay': 0.1, 'decoupled_decay': True}


def test_decoupled_decay_has_a_mask():
    decay = dialects.timm(RATE, **DECOUPLED)
    masked = dialects.timm(RATE, **DECOUPLED, mask=_ONLY_MATRIX)
    assert_other(masked, decay)
    assert_other(masked, dialects.timm(RATE))


def test_mxnet_uses_momentum_only_when_centered():
    assert_same(dialects.mxnet(RATE, momentum=0.5), dialects.mxnet(RATE))
    assert_same(dialects.mxnet1(RATE, gamma2=0.5), dialects.mxnet1(RATE))


def test_cautious_is_the_caution_of_timm_around_any_optimizer():
    inner = dialects.timm(RATE, momentum=0.9)
    assert_same(rmsprop_jax.cautious(inner), dialects.timm(RATE, momentum=0.9, caution=True))
    tx, params = rmsprop_jax.cautious(optax.sgd(1.0, momentum=0.5)), {'w': jnp.zeros(4)}
    state = tx.init(params)
    for gradient in ([1.0, 1.0, -1.0, 1.0], [-0.25, 1.0, 2.0, 0.0]):
        updates, state = tx.update({'w': jnp.array(gradient)}, state)
    # The velocity is (0.25, 1.5, 1.5, 0.5), and half the entries agree with the gradient.
    np.testing.assert_array_equal(updates['w'], [0, -3, -3, 0])
    # Where few agree, the others grow no more than a thousand times.
    few = {'w': jnp.zeros(10000).at[0].set(1.0)}
    updates, _ = tx.update(few, tx.init(few))
    np.testing.assert_allclose(updates['w'][0], -1000, rtol=1e-6)
    with pytest.raises(TypeError, match=r"updates\['w'\] is complex"):
        tx.update({'w': jnp.ones(4, jnp.complex64)}, state)


def test_caution_needs_momentum():
    assert_same(dialects.timm(RATE, caution=True), dialects.timm(RATE))


CLIPS = ('clipnorm', 'clipvalue', 'global_clipnorm')


@pytest.mark.parametrize(('one', 'other'), list(itertools.permutations(CLIPS, 2)))
def test_two_kinds_of_clipping(one, other):
    with pytest.raises(ValueError, match='at most one of'):
        dialects.keras(**{one: 1.0, other: 1.0})
    # Keras counts a zero, which means no clipping, among those that are given.
    with pytest.raises(ValueError, match='at most one of'):
        dialects.keras(**{one: 0.0, other: 1.0})
    if 'clipvalue' in (one, other):
        assert_other(dialects.keras_legacy(**{one: 0.1, other: 0.2}), dialects.keras_legacy())
    else:
        with pytest.raises(ValueError, match='not both'):
            dialects.keras_legacy(**{one: 1.0, other: 1.0})
        # As in tf_keras, also where both mean none.
        with pytest.raises(ValueError, match='at most one of clipnorm, global_clipnorm'):
            dialects.tf_keras(**{one: 0.0, other: 0.0})


def test_the_average_of_tf_keras_starts_at_the_parameters():
    """As tf_keras 2.21 computes it: p = g = 1."""
    tx = dialects.tf_keras(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2)
    one = jnp.ones(())
    state, p, seen = tx.init(one), one, []
    for _ in range(4):
        update, state = tx.update(one, state, p)
        p += update
        seen.append((p, optax.tree.get(state, 'ema')))
    expected = [(0.683772, 0.968377), (0.916975,) * 2, (0.724880, 0.897766), (0.863425,) * 2]
    np.testing.assert_allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize('name', CLIPS)
def test_zero_means_no_clipping_in_keras(name):
    assert_same(dialects.keras(RATE, **{name: 0.0}), dialects.keras(RATE))


@pytest.mark.parametrize('name', ['clip_gradient', 'clip_weights'])
def test_zero_means_no_clipping_in_mxnet(name):
    for make in (dialects.mxnet, dialects.mxnet1):
        assert_same(make(RATE, **{name: 0.0}), make(RATE))


@pytest.mark.parametrize('epsilon', [0, 0.0, None])
def test_zero_epsilon_means_the_default_in_legacy_keras(epsilon):
    assert_same(dialects.keras_legacy(epsilon=epsilon), dialects.keras_legacy(epsilon=1e-7))


def test_an_infinite_norm_makes_all_gradients_nan():
    tx = dialects.keras(global_clipnorm=1.0)
    grads = {'a': jnp.array([jnp.inf, 1.0]), 'b': jnp.ones(2)}
    updates, _ = tx.update(grads, tx.init(grads))
    assert all(np.isnan(u).all() for u in updates.values())


@pytest.mark.parametrize('order', [0, -1.0, -np.inf, np.nan])
def test_orders_that_are_no_norm(order):
    with pytest.raises(ValueError, match='norm_type must be positive'):
        dialects.torch_clip_grad_norm(1.0, order)


def test_corrected_decay_of_a_schedule_needs_its_peak():
    with pytest.raises(ValueError, match='needs max_lr'):
        dialects.timm(halving, weight_decay=0.1, decoupled_decay=True, corrected_weight_decay=True)


# --- Frameworks of the table ----------------------------------------------------------------------


def optimisers_jl(p: Any, g: Any, s: Memory, rate: float) -> Any:
    s.n = 0.9 * s.n + 0.1 * np.abs(g) ** 2
    return p - g * (rate / (np.sqrt(s.n) + 1e-8))


def caffe2(p: Any, g: Any, s: Memory, rate: float) -> Any:
    s.n = s.n + 0.1 * (g**2 - s.n)
    s.b = 0.0 * s.b + rate * g / np.sqrt(s.n + 1e-5)
    return p - s.b


def jax_example(make: Callable[[float], Any]) -> np.ndarray:
    init, update, get_params = make(RATE)
    params, gradients = jax.tree.map(jnp.asarray, (PROBLEM.params, PROBLEM.gradients))
    state, rows = init(params), []
    for t in range(12):
        state = update(t, {n: g[t] for n, g in gradients.items()}, state)
        rows.append(flat(jax.tree.map(np.asarray, get_params(state))))
    return np.stack(rows)


# What the frameworks of the table are compared with at their defaults: what they do live or in
# equations, at the rate above, or the trace that they recorded and its learning rate.
REFERENCES: dict[str, Callable[[], np.ndarray] | tuple[str, float]] = {
    'Optax': lambda: run(optax.rmsprop(RATE)),
    'Sonnet': ('sonnet: defaults', float(np.float32(0.01))),
    'Chainer 7 `RMSprop`': ('chainer: defaults', 0.01),
    'Chainer 7 `RMSpropGraves`': ('chainer_graves: defaults', 1e-4),
    'Paddle': ('paddle: defaults', 0.01),
    'Caffe2': lambda: loop(caffe2, lambda t: RATE),
    'MLX': ('mlx: defaults', float(np.float32(0.01))),
    'Optimisers.jl': lambda: loop(optimisers_jl, lambda t: RATE),
    '`jax.example_libraries.optimizers.rmsprop`': lambda: jax_example(optimizers.rmsprop),
    '`jax.example_libraries.optimizers.rmsprop_momentum`': lambda: jax_example(
        optimizers.rmsprop_momentum
    ),
    'bitsandbytes': ('bitsandbytes: defaults', 0.01),
}


@pytest.mark.parametrize('entry', EQUIVALENTS, ids=lambda entry: entry.framework)
def test_equivalents(entry):
    """Their expressions give what the frameworks give, to the rounding of the numbers they hold."""
    (reference,) = [r for start, r in REFERENCES.items() if entry.framework.startswith(start)]
    names = {'rmsprop': rmsprop, 'dialects': dialects, 'optax': optax}
    wide = not entry.framework.startswith('bitsandbytes')
    with jax.enable_x64(wide):
        if callable(reference):
            ours, theirs = run(eval(entry.ours, names, {'lr': RATE})), reference()
            limit = 1e-12
        else:
            name, rate = reference
            given = problem(CONFIGURATIONS[name])
            after = run(eval(entry.ours, names, {'lr': rate}), given=given)
            ours = after[np.array(recorded_steps(CONFIGURATIONS[name])) - 1]
            with np.load(GOLDEN / f'{FAMILIES[name.partition(":")[0]]}.npz') as file:
                theirs = file[name]
            # Sonnet and Paddle hold their other defaults in float32, and bitsandbytes everything:
            # a decay of 0.9 is off by 3e-8 of it, and its complement by 2e-7.
            limit = 1e-12 if entry.framework.startswith(('Chainer', 'MLX')) else 1e-6
    np.testing.assert_allclose(ours, theirs, rtol=limit, atol=limit)


# The file that holds the traces of each.
FAMILIES = {
    'sonnet': 'tensorflow',
    'chainer': 'mxnet1',
    'chainer_graves': 'mxnet1',
    'paddle': 'paddle',
    'mlx': 'torch',
    'bitsandbytes': 'torch',
}


@pytest.mark.parametrize(
    ('start', 'name'),
    [
        ('Sonnet', 'sonnet'),
        ('Chainer 7 `RMSprop`', 'chainer'),
        ('Chainer 7 `RMSpropGraves`', 'chainer_graves'),
        ('Paddle', 'paddle'),
        ('MLX', 'mlx'),
        ('bitsandbytes', 'bitsandbytes'),
    ],
)
def test_the_table_states_the_recorded_signatures(start, name):
    (entry,) = [e for e in EQUIVALENTS if e.framework.startswith(start)]
    stated = dict(re.findall(r'(\w+)=([\w.-]+)', entry.theirs))
    recorded = {n: default for n, default in signatures()[name].items() if n in stated}
    assert len(stated) >= 2
    assert stated.keys() == recorded.keys()
    for argument, default in stated.items():
        theirs = recorded[argument]
        assert (theirs == default) or float(theirs) == float(default), argument


# --- Schedules, jit and injection -----------------------------------------------------------------

# What each dialect reads at every step.
READ = {
    name: [
        n
        for n, p in inspect.signature(make).parameters.items()
        if p.annotation in (ScalarOrSchedule, ScalarOrSchedule | None)
    ]
    for name, make in DIALECTS.items()
}
NUMBERS: dict[str, Any] = {
    'lr': RATE,
    'learning_rate': RATE,
    'eps': 0.01,
    'epsilon': 0.01,
    'weight_decay': 0.1,
    'wd': 0.1,
    'ema_momentum': 0.5,
}
SCHEDULED = [(name, argument) for name, arguments in READ.items() for argument in arguments]


def full(name: str) -> dict[str, Any]:
    """Every number of a dialect, with a value that is not its default."""
    options = {n: NUMBERS.get(n, 0.8) for n in READ[name]}
    if 'use_ema' in parameters(name):
        options |= _EMA
    if name.startswith('mxnet'):
        options |= {'centered': True}
    if name == 'keras_legacy':
        options |= {'decay': 0.1}
    return options


def test_annotations_name_what_may_be_a_schedule():
    assert READ['torch'] == ['lr', 'alpha', 'eps', 'weight_decay', 'momentum']
    assert READ['hinton'] == ['learning_rate', 'decay']


@pytest.mark.extended
@pytest.mark.parametrize(('name', 'argument'), SCHEDULED)
def test_schedules(name, argument):
    """A constant schedule is its number, and a schedule that changes after 6 steps changes what
    follows and nothing before."""
    options = full(name)
    value = options[argument]

    @jax.jit
    def changed_after(steps: Any, given: Any) -> Any:
        schedule = lambda count: jnp.where(count < steps, value, 0.5 * value)  # noqa: E731
        return steps_of(DIALECTS[name](**options | {argument: schedule}), given)

    with jax.enable_x64(True):
        expected = run_once(name, 'full', **options)
        given = jax.tree.map(jnp.asarray, PROBLEM)
        constant, changed = (stacked(changed_after(steps, given)) for steps in (1000, 6))
    # An array's complement 1 - decay is taken as an array, and XLA may then fuse otherwise.
    np.testing.assert_allclose(constant, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(changed[:6], expected[:6], rtol=1e-13, atol=1e-14)
    assert np.abs(changed[6:] - expected[6:]).max() > 1e-6


@pytest.mark.extended
@pytest.mark.parametrize('name', DIALECTS)
def test_jit_equals_no_jit(name):
    with jax.enable_x64(True):
        tx = DIALECTS[name](**full(name))
        expected = run_once(name, 'full', **full(name))
        np.testing.assert_allclose(run(tx, jit=False), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.extended
@pytest.mark.parametrize('name', DIALECTS)
@pytest.mark.parametrize('wrapper', ['ours', "optax's"])
def test_injected_numbers(name, wrapper):
    """Under jit, injected numbers are followed, and give what the same numbers give directly."""
    options = full(name)
    fixed = {n: o for n, o in options.items() if n not in READ[name]}
    rate = 'lr' if 'lr' in options else 'learning_rate'
    with jax.enable_x64(True):
        if wrapper == 'ours':
            inject = rmsprop_jax.inject_hyperparams(DIALECTS[name])
        else:
            static = [*fixed, *_static(name)]
            inject = optax.inject_hyperparams(DIALECTS[name], static, jnp.dtype('float64'))
        tx = inject(**options)
        assert set(READ[name]) <= tx.init(PROBLEM.params).hyperparams.keys()
        expected = run_once(name, 'full', **options)
        np.testing.assert_allclose(run(tx), expected, rtol=1e-12, atol=1e-13)

        update = jax.jit(tx.update)
        gradients = {n: jnp.asarray(g[0]) for n, g in PROBLEM.gradients.items()}
        params = jax.tree.map(jnp.asarray, PROBLEM.params)
        state = tx.init(params)
        before, _ = update(gradients, state, params)
        state.hyperparams[rate] = jnp.asarray(2 * RATE)
        after, _ = update(gradients, state, params)
        difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), before, after)
        assert max(jax.tree.leaves(difference)) > 1e-3


def _static(name: str) -> list[str]:
    """What is no number: Optax must be told, where our wrapper knows."""
    wanted = ('ema_overwrite_frequency', 'gradient_accumulation_steps', 'mask', 'sparse')
    return [n for n in wanted if n in parameters(name)]


# --- Sparse rows and accumulation -----------------------------------------------------------------


@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize(
    ('dialect', 'momentum'),
    [
        (dialects.tensorflow, 0.9),
        (dialects.keras_legacy, 0.9),
        (dialects.keras_legacy, jnp.float32(0.9)),
        (dialects.keras_legacy, halving),
    ],
)
def test_rows_without_gradient_keep_all_their_statistics(dialect, momentum, centered):
    tx = dialect(0.1, momentum=momentum, centered=centered, sparse={'table': True, 'dense': False})
    params = {'table': jnp.ones((4, 3)), 'dense': jnp.ones((4, 3))}
    full = jnp.full((4, 3), 2.0)
    _, before = tx.update({'table': full, 'dense': full}, tx.init(params))
    rows = full.at[1].set(0.0).at[2, 0].set(0.0)
    updates, after = tx.update({'table': rows, 'dense': rows}, before)
    assert not updates['table'][1].any()
    # Momentum goes on in the dense one, and in every row that was touched at all.
    assert updates['dense'][1].all()
    assert updates['table'][jnp.array([0, 2, 3])].all()
    moments = ('mu', 'var', 'trace') if centered else ('nu', 'trace')
    for name in moments:
        old, new = optax.tree.get(before, name), optax.tree.get(after, name)
        np.testing.assert_array_equal(new['table'][1], old['table'][1])
        assert (new['dense'][1] != old['dense'][1]).all(), name
        assert (new['table'][2] != old['table'][2]).all(), name


@pytest.mark.parametrize('momentum', [0.0, jnp.float32(0.0)])
def test_legacy_keras_skips_rows_where_it_has_a_momentum(momentum):
    """An array counts as one, also at zero."""
    tx = dialects.keras_legacy(0.1, momentum=momentum, sparse=True)
    _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    _, state = tx.update(jnp.array([1.0, 0.0]), state)
    skips = not isinstance(momentum, float)
    np.testing.assert_allclose(optax.tree.get(state, 'nu'), [0.19, 0.1 if skips else 0.09], 1e-6)


@pytest.mark.parametrize('dialect', [dialects.tensorflow, dialects.keras_legacy])
def test_a_function_may_name_the_sparse_ones(dialect):
    def tables(tree: Any) -> Any:
        return {n: jnp.ndim(x) == 2 for n, x in tree.items()}

    options: dict[str, Any] = {'learning_rate': RATE, 'momentum': 0.9}
    only = {'matrix': True, 'vector': False, 'scalar': False}
    by_function = dialect(**options, sparse=tables)
    assert_same(by_function, dialect(**options, sparse=only))
    assert_other(by_function, dialect(**options, sparse=True))


NARROW, WIDE = ('bfloat16', 'float32', 'complex64'), ('float64', 'complex128')


@pytest.mark.parametrize(
    ('dtype', 'wide'),
    [*((name, False) for name in NARROW), *((name, True) for name in (*NARROW, *WIDE))],
)
def test_accumulation_keeps_every_dtype(dtype, wide):
    """Sums are in float32 or wider and complex where gradients are, in both precisions of JAX."""
    with jax.enable_x64(wide):
        params = jnp.asarray([1.0, 2.0], dtype)
        first, second = jnp.asarray([1.0, -3.0], dtype), jnp.asarray([2.0, 1.0], dtype)
        if jnp.iscomplexobj(params):
            first = first * (1 - 2j)
        # Rate and epsilon make it gradient descent.
        tx = dialects.keras(1.0, 0.0, epsilon=1e8, gradient_accumulation_steps=2)
        state = tx.init(params)
        held, state = tx.update(first, state, params)
        assert not held.any()
        update, after = tx.update(second, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, tx.init(params))
        assert update.dtype == held.dtype == params.dtype
        expected = -(np.asarray(first, complex) + np.asarray(second, complex)) / 2 * 1e-4
        rtol = 2.0**-8 if dtype == 'bfloat16' else 1e-6
        np.testing.assert_allclose(np.asarray(update, complex), expected, rtol=rtol)


def test_accumulation_takes_a_mean_and_its_schedule_the_calls():
    given = PROBLEM._replace(
        gradients={n: np.repeat(g, 3, 0) for n, g in PROBLEM.gradients.items()}
    )
    tx = dialects.keras(halving, gradient_accumulation_steps=3, weight_decay=0.1)
    # Steps are taken at calls 2, 5, 8, ...
    plain = dialects.keras(lambda count: halving(3 * count + 2), weight_decay=0.1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(run(tx, given=given)[2::3], run(plain), rtol=1e-13, atol=1e-14)
