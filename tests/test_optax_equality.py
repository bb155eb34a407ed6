"""`rmsprop` against its definition in extended precision, and against Optax as second witness."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import rmsprop_jax

STEPS = 1000
TOLERANCE = 1e-12


def relative_error(ours: np.ndarray, truth: np.ndarray) -> float:
    """The largest distance at any step, in units of the truth's largest entry at that step."""
    axes = tuple(range(1, truth.ndim))
    distance = np.abs(np.asarray(ours) - truth).max(axes)
    return float((distance / np.abs(truth).max(axes)).max())


def run(tx: optax.GradientTransformation, gradients: np.ndarray) -> np.ndarray:
    """The updates for a sequence of gradients, one array each, in one scan."""

    def step(state, g):
        update, state = tx.update(g, state)
        return state, update

    return np.asarray(jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g)[1])(gradients))


def gradients(kind: str = 'real') -> np.ndarray:
    """Gradients whose spread is comparable to their mean, over six orders of magnitude.

    The largest are around 10: far above the start value of 1, Optax's centered, corrected first
    step would cancel.
    """
    rng = np.random.default_rng(0)
    scale = 10.0 ** np.linspace(-5, 1, 6)
    g = scale * (rng.normal(size=(STEPS, 6)) + 0.5)
    return g + 1j * scale * rng.normal(size=(STEPS, 6)) if kind == 'complex' else g


@functools.cache
def true_directions(**options: float) -> np.ndarray:
    """Of `gradients()`. They take far longer than the steps, and do not depend on the momentum."""
    return reference.directions(gradients(), **options)  # pyright: ignore[reportArgumentType]


RATES = {
    'float': 0.1,
    'array': np.float64(0.1),
    'schedule': optax.exponential_decay(0.1, 200, 0.5),
}
MOMENTA = {'none': (None, False), 'momentum': (0.9, False), 'nesterov': (0.9, True)}


MORE = [pytest.param(rate, marks=pytest.mark.extended) for rate in ('array', 'schedule')]


@pytest.mark.parametrize('rate', ['float', *MORE])
@pytest.mark.parametrize('velocity', MOMENTA)
@pytest.mark.parametrize('bias_correction', [False, True])
@pytest.mark.parametrize('initial_scale', [0.0, pytest.param(1.0, marks=pytest.mark.extended)])
@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize('eps_in_sqrt', [True, False])
def test_rmsprop(eps_in_sqrt, centered, initial_scale, bias_correction, velocity, rate):
    momentum, nesterov = MOMENTA[velocity]
    averages = {
        'eps': 1e-6,
        'initial_scale': initial_scale,
        'eps_in_sqrt': eps_in_sqrt,
        'centered': centered,
        'bias_correction': bias_correction,
    }
    options = {'decay': 0.95, **averages, 'momentum': momentum, 'nesterov': nesterov}
    g = gradients()
    with jax.enable_x64(True):
        schedule = RATES[rate]
        learning_rate = jnp.asarray(schedule) if rate == 'array' else schedule
        ours = run(rmsprop_jax.rmsprop(learning_rate, **options), g)
        theirs = run(optax.rmsprop(learning_rate, **options), g)
        rates = schedule(jnp.arange(STEPS, dtype=jnp.int32)) if callable(schedule) else schedule
        rates = np.broadcast_to(rates, STEPS)
    u = true_directions(decays=0.95, **averages)
    truth = reference.with_momentum(u, rates, momentum, nesterov)
    assert relative_error(ours, truth) <= TOLERANCE
    if centered and bias_correction and initial_scale == 0:
        # Optax's first step is cancellation noise here, and with momentum it never forgets it.
        start = -rates[0] * g[0] / (np.sqrt(1e-6) if eps_in_sqrt else 1e-6)
        start = start * (1 + momentum if nesterov else 1)
        np.testing.assert_allclose(ours[0], start, rtol=TOLERANCE)
        if momentum is None:
            # From step 2 on, its direction is ours, to what its cancellation leaves of it.
            np.testing.assert_allclose(theirs[1:], ours[1:], rtol=1e-6)
    else:
        assert relative_error(theirs, truth) <= TOLERANCE


@pytest.mark.extended
@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize('eps_in_sqrt', [True, False])
def test_complex_gradients_share_one_magnitude(eps_in_sqrt, centered):
    g = gradients('complex')
    options = {'eps': 1e-6, 'eps_in_sqrt': eps_in_sqrt, 'centered': centered}
    with jax.enable_x64(True):
        ours = run(rmsprop_jax.rmsprop(0.1, momentum=0.9, **options), g)
        theirs = run(optax.rmsprop(0.1, momentum=0.9, **options), g)
    truth = reference.rmsprop_updates(g, 0.1, momentum=0.9, **options)
    assert relative_error(ours, truth) <= TOLERANCE
    assert relative_error(theirs, truth) <= TOLERANCE


@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize('initial_scale', [0.0, 2.0])
@pytest.mark.parametrize('bias_correction', [False, True])
def test_schedules_of_decay_eps_and_momentum(bias_correction, initial_scale, centered):
    def decay(t):
        return 0.99 - 0.9 / (t + 1)

    def eps(t):
        return 1e-3 / (t + 1)

    def momentum(t):
        return 0.9 * (1 - 0.99**t)

    g = gradients()
    options = {
        'bias_correction': bias_correction,
        'centered': centered,
        'initial_scale': initial_scale,
    }
    with jax.enable_x64(True):
        ours = run(rmsprop_jax.rmsprop(0.1, decay, eps, momentum=momentum, **options), g)
    steps = np.arange(STEPS)
    truth = reference.rmsprop_updates(
        g, 0.1, momentum(steps), decays=decay(steps), eps=eps(steps), **options
    )
    assert relative_error(ours, truth) <= TOLERANCE


def test_float32_stays_within_its_rounding():
    g = gradients().astype(np.float32)
    for centered, bias_correction in itertools.product([False, True], repeat=2):
        options = {'eps': 1e-6, 'centered': centered, 'bias_correction': bias_correction}
        ours = run(rmsprop_jax.rmsprop(0.1, momentum=0.9, **options), g)
        truth = reference.rmsprop_updates(g, 0.1, momentum=0.9, **options)
        # A tenth-order average of roundings of 6e-8 each, through a root and a momentum of 0.9.
        assert relative_error(ours, truth) < 5e-6


def test_python_decay_is_complemented_in_double_precision():
    g = np.ones((1, 1), np.float32)
    exact = 1 - 0.9999
    for decay, tolerance in ((0.9999, 1e-7), (jnp.float32(0.9999), 3e-4)):
        tx = rmsprop_jax.scale_by_rms(decay)
        _, state = tx.update(g[0], tx.init(g[0]))
        np.testing.assert_allclose(state.nu, exact, rtol=tolerance)


def test_weight_decay_is_decoupled_and_follows_the_schedule():
    schedule = optax.linear_schedule(0.1, 0.01, 20)
    mask = {'w': True, 'b': False}
    params = {'w': jnp.full(3, 2.0), 'b': jnp.full(3, 2.0)}
    plain = rmsprop_jax.rmsprop(schedule, momentum=0.9)
    decayed = rmsprop_jax.rmsprop(schedule, momentum=0.9, weight_decay=0.5, mask=mask)
    states = plain.init(params), decayed.init(params)
    for t in range(20):
        g = jax.tree.map(lambda p, t=t: p * 0 + np.cos(t), params)
        expected, s0 = plain.update(g, states[0], params)
        got, s1 = decayed.update(g, states[1], params)
        states = s0, s1
        np.testing.assert_array_equal(got['b'], expected['b'])
        shrink = float(schedule(t)) * 0.5 * np.asarray(params['w'])
        np.testing.assert_allclose(got['w'], expected['w'] - shrink, rtol=1e-6)
        for name in ('nu', 'trace'):
            a, b = (optax.tree.get(s, name) for s in states)
            np.testing.assert_array_equal(a['w'], b['w'])


def test_coupled_weight_decay_is_a_chain():
    params, g = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.4])
    tx = optax.chain(optax.add_decayed_weights(0.1), rmsprop_jax.rmsprop(0.01))
    update, _ = tx.update(g, tx.init(params), params)
    truth = reference.rmsprop_updates(np.asarray(g + 0.1 * params, float)[None], 0.01)[0]
    np.testing.assert_allclose(update, truth.astype(float), rtol=1e-6)
