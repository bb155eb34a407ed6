"""`inject_hyperparams(f)(x)` is `f(x)`, bit for bit, until somebody changes a number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax
from rmsprop_jax import dialects, recipes, storage

pytestmark = pytest.mark.extended

PARAMS = {
    'kernel': jnp.linspace(-2, 3, 12).reshape(4, 3),
    'bias': jnp.array([0.5, 0.0, -1.5]),
}
_ALL = storage.large_leaves(storage.bfloat16(), min_size=1, min_ndim=0)


def _halved(count):
    return 0.01 / (1 + 0.1 * jnp.asarray(count, float))


RMSPROP = rmsprop_jax.rmsprop
FACTORIES = {
    'rmsprop': (RMSPROP, {'learning_rate': 0.01, 'decay': 0.999}),
    'rmsprop-momentum': (RMSPROP, {'learning_rate': 0.01, 'decay': 0.95, 'momentum': 0.9}),
    'rmsprop-nesterov': (
        RMSPROP,
        {'learning_rate': 0.01, 'decay': 0.95, 'momentum': 0.9, 'nesterov': True},
    ),
    'rmsprop-corrected': (
        RMSPROP,
        {'learning_rate': 0.01, 'decay': 0.999, 'eps_in_sqrt': False, 'bias_correction': True},
    ),
    'rmsprop-centered': (
        RMSPROP,
        {
            'learning_rate': _halved,
            'decay': 0.999,
            'centered': True,
            'bias_correction': True,
            'weight_decay': 1e-3,
        },
    ),
    'rmsprop-bfloat16': (
        RMSPROP,
        {'learning_rate': 0.01, 'decay': 0.999, 'centered': True, 'storage': _ALL},
    ),
    'rmsprop-no-epsilon': (RMSPROP, {'learning_rate': 0.01, 'decay': 0.999, 'eps': 0.0}),
    'scale_by_rms': (rmsprop_jax.scale_by_rms, {'decay': 0.999, 'initial_scale': 1.0}),
    'scale_by_stddev': (rmsprop_jax.scale_by_stddev, {'decay': 0.999}),
    'trace': (rmsprop_jax.trace, {'decay': 0.999}),
    'torch': (
        dialects.torch,
        {'lr': 0.01, 'alpha': 0.999, 'weight_decay': 1e-3, 'momentum': 0.9, 'centered': True},
    ),
    'torch_clip_grad_norm': (dialects.torch_clip_grad_norm, {'max_norm': 0.3}),
    'keras': (
        dialects.keras,
        {
            'learning_rate': 0.01,
            'rho': 0.999,
            'weight_decay': 1e-3,
            'clipnorm': 0.3,
            'use_ema': True,
            'ema_momentum': 0.9,
            'ema_overwrite_frequency': 3,
            'loss_scale_factor': 4.0,
            'gradient_accumulation_steps': 3,
        },
    ),
    'keras-scaled': (dialects.keras, {'learning_rate': 0.01, 'loss_scale_factor': 3.0}),
    'keras_legacy': (
        dialects.keras_legacy,
        {'learning_rate': 0.01, 'rho': 0.999, 'clipvalue': 0.3, 'decay': 1e-3},
    ),
    'keras_legacy-sparse': (
        dialects.keras_legacy,
        {'learning_rate': 1e-4, 'rho': 0.999, 'momentum': 0.9, 'sparse': True},
    ),
    'tf_keras': (
        dialects.tf_keras,
        {
            'learning_rate': 0.01,
            'rho': 0.999,
            'weight_decay': 1e-3,
            'clipnorm': 0.3,
            'use_ema': True,
            'ema_momentum': 0.9,
            'ema_overwrite_frequency': 3,
        },
    ),
    'tensorflow': (
        dialects.tensorflow,
        {'learning_rate': 0.01, 'decay': 0.999, 'momentum': 0.9, 'sparse': True},
    ),
    'timm': (
        dialects.timm,
        {
            'lr': 0.01,
            'alpha': 0.999,
            'weight_decay': 1e-3,
            'momentum': 0.9,
            'decoupled_decay': True,
            'corrected_weight_decay': True,
            'caution': True,
            'max_lr': 0.03,
        },
    ),
    'stable_baselines3': (
        dialects.stable_baselines3,
        {'lr': 0.01, 'alpha': 0.999, 'weight_decay': 1e-3, 'momentum': 0.9},
    ),
    'mxnet': (
        dialects.mxnet,
        {'learning_rate': 0.01, 'rho': 0.999, 'wd': 1e-3, 'rescale_grad': 0.3, 'clip_weights': 2.0},
    ),
    'mxnet1': (
        dialects.mxnet1,
        {'learning_rate': 0.01, 'gamma1': 0.999, 'centered': True, 'clip_gradient': 0.3},
    ),
    'graves': (dialects.graves, {'learning_rate': 0.01, 'decay': 0.999}),
    'hinton': (dialects.hinton, {'learning_rate': 0.01, 'decay': 0.999}),
}


@jax.jit
def gradient(params, count):
    return jax.tree.map(lambda p: jnp.sin(3 * p + count), params)


def trajectory(tx, start=lambda state: state, steps=50, transform=jax.jit):
    """The parameters after each of many steps on gradients that change, and the last state."""
    update, params, state, seen = transform(tx.update), PARAMS, start(tx.init(PARAMS)), []
    for count in range(steps):
        updates, state = update(gradient(params, float(count)), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(jax.tree.map(np.asarray, params))
    return seen, state


def uncompiled(update):
    """One operation after the other."""

    def step(*args):
        with jax.disable_jit():
            return update(*args)

    return step


# Where XLA rounds two operations once in one program and twice in the other. Uncompiled they are
# equal there too.
EXCEPTIONS = {
    'tf_keras': 'the average takes the place of the parameters; JAX 0.12 fuses it in another way',
    'rmsprop-centered': 'the schedule multiplies and adds, and only one program fuses the two',
    'keras-scaled': 'known factors that are no powers of two are multiplied with each other first',
    'keras_legacy-sparse': 'as tensorflow',
    'tensorflow': 'rows are skipped, and the two velocities are fused with different producers',
}


@pytest.mark.parametrize('name', FACTORIES)
def test_injected_numbers_take_the_same_steps(name):
    factory, arguments = FACTORIES[name]
    how = {'transform': uncompiled, 'steps': 8} if name in EXCEPTIONS else {}
    plain, state = trajectory(factory(**arguments), **how)
    injected, held = trajectory(rmsprop_jax.inject_hyperparams(factory)(**arguments), **how)
    jax.tree.map(np.testing.assert_array_equal, injected, plain)
    assert held.hyperparams
    # A schedule has a count of its own where it is not injected.
    for one, other in zip(statistics(held), statistics(state), strict=True):
        np.testing.assert_array_equal(one, other)


def statistics(state):
    state = getattr(state, 'inner_state', state)
    return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize('name', EXCEPTIONS)
def test_exceptions_differ_by_rounding_alone(name):
    factory, arguments = FACTORIES[name]
    plain, _ = trajectory(factory(**arguments))
    injected, _ = trajectory(rmsprop_jax.inject_hyperparams(factory)(**arguments))
    # A unit in the last place of parameters between 2 and 4; or four where an average takes their
    # place, so that a rounding goes into the steps after it.
    units = 4 if name == 'tf_keras' else 1
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=units * 2.0**-22)
    jax.tree.map(close, injected, plain)


@pytest.mark.parametrize('x64', [False, True])
def test_a_changed_decay_is_used_from_then_on(x64):
    with jax.enable_x64(x64):
        make = rmsprop_jax.inject_hyperparams(RMSPROP)

        def changed(state):
            return state._replace(hyperparams=state.hyperparams | {'decay': jnp.array(0.9)})

        got, _ = trajectory(make(0.01, decay=0.999), changed, steps=5)
        expected, _ = trajectory(RMSPROP(0.01, jnp.array(0.9)), steps=5)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_complement_of_what_was_given_is_exact():
    """optax#1532: 1 - 0.999 of a float32 is off by 1.3e-5."""
    tx = rmsprop_jax.inject_hyperparams(rmsprop_jax.scale_by_rms)(decay=0.999)
    _, state = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
    assert state.inner_state.nu == np.float32(0.001)
    assert np.float32(1) - np.float32(0.999) != np.float32(0.001)
    # Optax's own wrapper cannot know what was given.
    tx = optax.inject_hyperparams(rmsprop_jax.scale_by_rms)(decay=0.999)
    _, state = tx.update(jnp.ones(()), tx.init(jnp.ones(())), jnp.ones(()))
    assert state.inner_state.nu == np.float32(1) - np.float32(0.999)


_EPOCHS = {'steps_per_epoch': 3, 'batch_size': 256}
_FRAMES = {'total_frames': 4000.0, 'frames_per_update': 100.0}
RECIPES = {
    'graves': {},
    'dqn_nature': {},
    'dopamine_dqn': {},
    'sb3_a2c': {},
    'sb3_a2c_tf_like': {},
    'wgan': {'network': 'critic'},
    'a3c': {**_FRAMES, 'max_norm': 40.0},
    'baselines_a2c': {'total_timesteps': 4000.0, 'batch_size': 100.0},
    'impala_dmlab': _FRAMES,
    'impala_dmlab30': _FRAMES,
    'impala_atari': {**_FRAMES, 'mean_over': 8},
    'impala_torchbeast': {'total_steps': 4000.0, 'steps_per_update': 100.0},
    'inception_v3': _EPOCHS,
    'mnasnet': _EPOCHS,
    'efficientnet': _EPOCHS,
    'mobilenet_v2': _EPOCHS,
    'efficientnet_timm': {**_EPOCHS, 'warmup_epochs': 2},
    'mobilenet_v3_timm': {'steps_per_epoch': 3, 'warmup_epochs': 2},
}


def test_every_recipe_is_injected():
    assert RECIPES.keys() == {recipe.name for recipe in recipes.RECIPES}


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_with_a_rate_to_read_and_change(name):
    recipe, arguments = getattr(recipes, name), RECIPES[name]
    inject = rmsprop_jax.inject_hyperparams(recipe)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2.0**-22)
    plain, _ = trajectory(recipe(**arguments), steps=8)
    injected, state = trajectory(inject(**arguments), steps=8)
    jax.tree.map(close, injected, plain)
    constant = next(r for r in recipes.RECIPES if r.name == name).schedule == 'constant'
    assert ('learning_rate' in state.hyperparams) == constant
    # A rate that is given is a constant one, whatever was published.
    given, _ = trajectory(recipe(**arguments, learning_rate=0.5), steps=8)
    tx = inject(**arguments, learning_rate=0.1)

    def faster(state):
        return state._replace(hyperparams={'learning_rate': jnp.array(0.5)})

    changed, _ = trajectory(tx, faster, steps=8)
    jax.tree.map(close, changed, given)
    first = tx.init(PARAMS).hyperparams['learning_rate']
    assert first == np.float32(0.1)


def test_partial_of_a_factory_is_one():
    factory = functools.partial(RMSPROP, momentum=0.9)
    plain, _ = trajectory(factory(0.01, 0.999), steps=10)
    injected, _ = trajectory(rmsprop_jax.inject_hyperparams(factory)(0.01, 0.999), steps=10)
    jax.tree.map(np.testing.assert_array_equal, injected, plain)


def test_arguments_of_other_factories_are_theirs():
    """`mask` and `storage` are numbers here, and integers that a mask leaves out are no fault."""

    def factory(learning_rate, mask, momentum=0.0):
        return optax.masked(
            optax.chain(RMSPROP(learning_rate), optax.scale(mask), optax.trace(momentum)),
            {'weights': True, 'steps': False},
        )

    tx = rmsprop_jax.inject_hyperparams(factory)(0.1, 2.0)
    params = {'weights': jnp.ones(2), 'steps': jnp.array(3)}
    updates, state = tx.update(params, tx.init(params), params)
    assert sorted(state.hyperparams) == ['learning_rate', 'mask', 'momentum']
    np.testing.assert_allclose(updates['weights'], -2 * 0.1 / np.sqrt(0.1), rtol=1e-6)
    assert updates['steps'] == 3


def test_optax_injects_our_rmsprop_without_params():
    tx = optax.inject_hyperparams(RMSPROP, hyperparam_dtype=jnp.float32)(learning_rate=0.1)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -0.1 / np.sqrt(0.1), rtol=1e-6)
