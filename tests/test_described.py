"""Transformations print as the call that made them, and are Optax's in everything else."""

import copy
import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import rmsprop_jax
from rmsprop_jax import dialects, storage

DIALECTS = [
    function
    for function in vars(dialects).values()
    if inspect.isfunction(function)
    and function.__module__ == dialects.__name__
    and not function.__name__.startswith('_')
]
FACTORIES = [
    rmsprop_jax.rmsprop,
    rmsprop_jax.scale_by_rms,
    rmsprop_jax.scale_by_stddev,
    rmsprop_jax.trace,
    *DIALECTS,
]
TEXT = (
    'rmsprop_jax.dialects.torch(lr=0.001, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0, '
    'centered=False, maximize=False)'
)


def made(factory):
    """A transformation, with 0.1 for every argument that must be given."""
    parameters = inspect.signature(factory).parameters.values()
    return factory(*[0.1 for p in parameters if p.default is p.empty])


def updated(tx):
    params = jnp.array([1.0, -2.0])
    return np.asarray(tx.update(jnp.array([0.5, 3.0]), tx.init(params), params)[0])


def test_there_are_enough_dialects():
    assert len(DIALECTS) >= 11


@pytest.mark.parametrize('factory', FACTORIES, ids=lambda factory: factory.__name__)
def test_the_text_is_a_call_that_makes_the_same_again(factory):
    tx = made(factory)
    again = eval(repr(tx), {'rmsprop_jax': rmsprop_jax})
    assert str(again) == str(tx)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    np.testing.assert_array_equal(updated(again), updated(tx))


def test_what_is_printed():
    assert repr(dialects.torch(1e-3)) == TEXT
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=storage.bfloat16())
    assert 'momentum=0.9' in repr(tx)
    assert 'storage=bfloat16(seed=0)' in repr(tx)
    assert 'mask' not in repr(tx)
    # None is told where it is not the default.
    assert 'epsilon=None' in repr(dialects.keras_legacy(epsilon=None))
    schedule = optax.cosine_decay_schedule(1e-2, 10)
    assert 'lr=<function cosine_decay_schedule' in repr(dialects.torch(schedule))
    mask = {f'layer{i}': True for i in range(1000)}
    assert len(repr(dialects.torch(weight_decay=0.1, mask=mask))) < 400


def test_traced_arguments_are_told_as_such():
    texts = []

    def update(lr):
        tx = dialects.torch(lr)
        texts.append(repr(tx))
        return tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]

    jax.jit(update)(0.1)
    assert 'lr=' in texts[0]
    assert 'Trac' in texts[0]


def test_optax_takes_it_as_its_own():
    tx = dialects.torch(1e-3)
    assert optax.with_extra_args_support(tx) is tx
    assert tx == tuple(tx)
    assert hash(tx) == hash(tuple(tx))
    init, update = tx
    assert (tx.init, tx.update) == (init, update)
    for wrapper in (
        lambda tx: optax.chain(tx, optax.identity()),
        lambda tx: optax.masked(tx, True),
        lambda tx: optax.partition({'ours': tx}, 'ours'),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.inject_hyperparams(lambda lr: dialects.torch(lr))(1e-3),
    ):
        np.testing.assert_allclose(updated(wrapper(tx)), updated(tx), rtol=1e-6)


def test_flax_keeps_it():
    tx = dialects.torch(1e-3)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(3)).sum())(model))

    step(model, optimizer)
    step(model, optimizer)
    assert repr(optimizer.tx) == TEXT

    state = TrainState.create(apply_fn=None, params={'w': jnp.ones(3)}, tx=tx)
    state = jax.jit(lambda state: state.apply_gradients(grads={'w': jnp.ones(3)}))(state)
    assert repr(state.tx) == TEXT


def test_it_is_a_static_argument():
    tx = dialects.torch(1e-3)

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, gradient, state):
        return tx.update(gradient, state)

    state = tx.init(jnp.ones(2))
    for _ in range(2):
        _, state = step(tx, jnp.ones(2), state)
    assert step._cache_size() == 1


def test_copies_keep_the_text_and_rebuilt_tuples_are_optax_s():
    tx = dialects.torch(1e-3)
    assert repr(copy.copy(tx)) == repr(copy.deepcopy(tx)) == TEXT
    for rebuilt in (tx._replace(init=tx.init), jax.tree.map(lambda leaf: leaf, tx)):
        assert 'init=<function' in repr(rebuilt)
        np.testing.assert_array_equal(updated(rebuilt), updated(tx))
    # Closures cannot be pickled, in Optax and here.
    for closures in (tx, optax.rmsprop(1e-3)):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(closures)
