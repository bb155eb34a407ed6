"""Bad input gets one clear error, early, that names the argument and the leaf."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax
from rmsprop_jax import (
    dialects,
    inject_hyperparams,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
    trace,
)

PARAMS = {'dense': {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)}}

BAD_HYPERPARAMETERS = [
    ('decay', 1.5, ValueError, r'decay must be in \[0, 1\], got 1.5'),
    ('decay', -0.1, ValueError, 'decay must be in'),
    ('decay', float('nan'), ValueError, 'decay must be finite, got nan'),
    ('decay', np.float64('nan'), ValueError, 'decay must be finite'),
    ('decay', 'big', TypeError, "decay must be a real scalar, got 'big'"),
    ('decay', None, TypeError, 'decay must be a real scalar, got None'),
    ('decay', True, TypeError, 'decay must be a real scalar'),
    ('decay', 0.9j, TypeError, 'decay must be a real scalar'),
    ('decay', [0.9], TypeError, 'decay must be a real scalar'),
    ('decay', jnp.ones(3), ValueError, r'decay must be a scalar, got an array of shape \(3,\)'),
    ('decay', jnp.array(0.9j), TypeError, 'decay must be real, got an array of dtype complex64'),
    ('decay', jnp.array(True), TypeError, 'decay must be real, got an array of dtype bool'),
    ('decay', jnp.bfloat16(0.999), TypeError, 'decay has dtype bfloat16.*hyperparam_dtype'),
    ('decay', jnp.float16(0.999), TypeError, 'decay has dtype float16'),
    ('decay', np.float16(0.999), TypeError, 'decay has dtype float16'),
    ('momentum', 1.5, ValueError, r'momentum must be in \[0, 1\]'),
    ('momentum', jnp.bfloat16(0.9), TypeError, 'momentum has dtype bfloat16'),
    ('eps', -1e-8, ValueError, r'eps must be in \[0, inf\)'),
    ('eps', float('inf'), ValueError, 'eps must be finite'),
    ('initial_scale', -1.0, ValueError, 'initial_scale must be in'),
    ('initial_scale', lambda count: 1.0, TypeError, 'initial_scale.*cannot be a schedule'),
    ('weight_decay', -1e-4, ValueError, 'weight_decay must be in'),
    ('weight_decay', float('nan'), ValueError, 'weight_decay must be finite'),
    ('learning_rate', float('nan'), ValueError, 'learning_rate must be finite'),
    ('learning_rate', '0.1', TypeError, 'learning_rate must be a real scalar'),
    ('learning_rate', jnp.ones((2, 2)), ValueError, 'learning_rate must be a scalar'),
    ('eps_in_sqrt', 1e-8, TypeError, 'eps_in_sqrt must be True or False, got 1e-08'),
    ('centered', 0.9, TypeError, 'centered must be True or False, got 0.9'),
    ('bias_correction', 'yes', TypeError, 'bias_correction must be True or False'),
]


@pytest.mark.parametrize(('name', 'value', 'error', 'message'), BAD_HYPERPARAMETERS)
def test_hyperparameters(name, value, error, message):
    with pytest.raises(error, match=message):
        rmsprop(**{'learning_rate': 0.1, name: value})
    if name in ('decay', 'eps', 'initial_scale', 'eps_in_sqrt', 'bias_correction'):
        for factory in (scale_by_rms, scale_by_stddev):
            with pytest.raises(error, match=message):
                factory(**{name: value})
    if name == 'decay':
        with pytest.raises(error, match=message):
            trace(value)


FRAMEWORKS_NAMES = [
    (function, name)
    for function in vars(dialects).values()
    if inspect.isfunction(function)
    and function.__module__ == dialects.__name__
    and not function.__name__.startswith('_')
    for name in inspect.signature(function).parameters
    if name in ('lr', 'alpha', 'rho', 'gamma1', 'gamma2', 'epsilon', 'wd')
]


@pytest.mark.parametrize(('dialect', 'name'), FRAMEWORKS_NAMES)
def test_numbers_go_by_the_name_that_the_framework_gives_them(dialect, name):
    rate = next(iter(inspect.signature(dialect).parameters))
    arguments = {rate: 0.1, 'centered': True}
    with pytest.raises(TypeError, match=f'^{name} must be a real scalar'):
        dialect(**{**arguments, name: '0.1'})
    if name == rate:
        with pytest.raises(TypeError, match=f'^{name} must be a real scalar'):
            dialect('0.1')
    params = jnp.ones(2)
    tx = dialect(**{**arguments, name: lambda count: jnp.nan})
    with pytest.raises(ValueError, match=f'^{name} must be finite'):
        tx.update(params, tx.init(params), params)


def test_nesterov_must_be_a_flag():
    with pytest.raises(TypeError, match='nesterov must be True or False'):
        rmsprop(0.1, momentum=0.9, nesterov=0.5)


def test_narrow_schedules_are_refused_when_traced():
    tx = rmsprop(0.1, decay=lambda count: jnp.bfloat16(0.999))
    with pytest.raises(TypeError, match='decay has dtype bfloat16'):
        jax.jit(tx.update)(PARAMS, tx.init(PARAMS))


def test_optax_injection_into_bfloat16_parameters():
    """Optax would hold 0.999 as 1 and freeze the average; ours says so, and how to mend it."""
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(TypeError, match='hyperparam_dtype=jnp.float32'):
        optax.inject_hyperparams(rmsprop)(0.1, decay=0.999).init(narrow)
    optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(0.1, decay=0.999).init(narrow)
    inject_hyperparams(rmsprop)(0.1, decay=0.999).init(narrow)


@pytest.mark.parametrize('tx', [rmsprop(0.1), scale_by_stddev(), trace(0.9)], ids=range(3))
@pytest.mark.parametrize(
    ('leaf', 'message'),
    [
        (jnp.ones(3, jnp.int32), "params['dense']['steps'] has dtype int32"),
        (jnp.ones(3, bool), "params['dense']['steps'] has dtype bool"),
        (np.arange(3), "params['dense']['steps'] has dtype int"),
        (7, "params['dense']['steps'] has dtype int32"),
        ('name', "params['dense']['steps'] is a str"),
        (jax.random.key(0), "params['dense']['steps'] has dtype key"),
    ],
    ids=['int', 'bool', 'numpy', 'python', 'str', 'key'],
)
def test_parameters_must_be_floating(tx, leaf, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        tx.init({'dense': {'kernel': jnp.ones(2), 'steps': leaf}})


def test_a_single_integer_parameter_is_named_too():
    with pytest.raises(TypeError, match='params has dtype int32'):
        rmsprop(0.1).init(jnp.arange(3))


@pytest.mark.parametrize('jit', [True, False], ids=['jit', 'eager'])
@pytest.mark.parametrize(
    'tx',
    [rmsprop(0.1), rmsprop(0.1, centered=True), rmsprop(0.1, momentum=0.9), trace(0.9)],
    ids=['rmsprop', 'centered', 'momentum', 'trace'],
)
class TestGradientsThatDoNotFit:
    def check(self, tx, jit, gradients, error, *messages):
        state = tx.init(PARAMS)
        with pytest.raises(error) as raised:
            (jax.jit(tx.update) if jit else tx.update)(gradients, state)
        for message in messages:
            assert message in str(raised.value)

    def test_missing_and_extra_leaves(self, tx, jit):
        gradients = {'dense': {'kernel': jnp.ones((4, 3)), 'scale': jnp.ones(3)}}
        self.check(
            tx,
            jit,
            gradients,
            ValueError,
            'structure of updates does not match',
            "only in updates: ['dense']['scale']",
            "only in the state: ['dense']['bias']",
        )

    def test_none_where_the_state_has_a_leaf(self, tx, jit):
        gradients = {'dense': {'kernel': jnp.ones((4, 3)), 'bias': None}}
        self.check(tx, jit, gradients, ValueError, "only in the state: ['dense']['bias']")

    def test_another_container(self, tx, jit):
        gradients = {'dense': (jnp.ones(3), jnp.ones((4, 3)))}
        self.check(tx, jit, gradients, ValueError, 'updates: PyTreeDef', 'state: PyTreeDef')

    def test_leaf_in_the_place_of_a_tree(self, tx, jit):
        self.check(
            tx,
            jit,
            {'dense': jnp.ones(3)},
            ValueError,
            "updates['dense'] has shape (3,), but ",
            'has dict there',
        )

    def test_shape(self, tx, jit):
        gradients = {'dense': {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(3)}}
        messages = "updates['dense']['kernel'] has shape (3, 4), but ", 'has (4, 3) there'
        self.check(tx, jit, gradients, ValueError, *messages)

    def test_integer_gradients(self, tx, jit):
        gradients = {'dense': {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3, jnp.int32)}}
        self.check(tx, jit, gradients, TypeError, "updates['dense']['bias'] has dtype int32")


@pytest.mark.parametrize('tx', [rmsprop(0.1), trace(0.9)], ids=['rmsprop', 'trace'])
def test_gradients_of_integers(tx):
    """What `jax.grad(..., allow_int=True)` gives for an integer; jit itself refuses it earlier."""
    with pytest.raises(TypeError, match='updates has dtype'):
        tx.update(np.zeros(3, jax.dtypes.float0), tx.init(jnp.ones(3)))


@pytest.mark.parametrize('tx', [scale_by_stddev(), trace(0.9)], ids=['centered', 'trace'])
def test_complex_and_real_do_not_mix(tx):
    real, imaginary = jnp.ones(2), 1j * jnp.ones(2)
    with pytest.raises(TypeError, match='updates has dtype complex64, .* is float32'):
        tx.update(imaginary, tx.init(real))
    with pytest.raises(TypeError, match='updates has dtype float32, .* is complex64'):
        tx.update(real, tx.init(imaginary))


def test_complex_gradient_of_a_real_parameter_without_a_mean():
    """The second moment is real either way, so only the parameters can tell."""
    tx, real, imaginary = rmsprop(0.1), jnp.ones(2), 1j * jnp.ones(2)
    for p, g in ((real, imaginary), (imaginary, real)):
        with pytest.raises(TypeError, match='updates has dtype'):
            tx.update(g, tx.init(p), p)


def test_foreign_states():
    tx = scale_by_rms()
    with pytest.raises(TypeError, match='RmsState that init returned, got ScaleByRmsState'):
        tx.update(PARAMS, optax.scale_by_rms().init(PARAMS))
    with pytest.raises(TypeError, match='TraceState that init returned, got EmptyState'):
        trace(0.9).update(PARAMS, optax.EmptyState())
    with pytest.raises(ValueError, match='another configuration.*centered=False.*mu, var'):
        tx.update(PARAMS, scale_by_stddev().init(PARAMS))
    with pytest.raises(ValueError, match='another configuration.*weight'):
        scale_by_rms(bias_correction=True).update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match='another configuration.*weight'):
        tx.update(PARAMS, scale_by_rms(bias_correction=True).init(PARAMS))


@pytest.mark.parametrize(
    ('make', 'name'),
    [(rmsprop, 'weight_decay'), (dialects.torch, 'weight_decay'), (dialects.mxnet, 'wd')],
)
def test_weight_decay_without_params(make, name):
    tx = make(0.1, **{name: 0.1})
    with pytest.raises(ValueError, match=f'^{name} needs params'):
        tx.update(PARAMS, tx.init(PARAMS))


def test_schedule_as_the_value_of_a_traced_flag():
    with pytest.raises(TypeError, match='centered must be True or False'):
        jax.jit(lambda flag: rmsprop_jax.rmsprop(0.1, centered=flag).init(PARAMS))(True)
