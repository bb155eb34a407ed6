"""Inside the wrappers, model libraries and precisions that people train with."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import dynamic_scale, train_state

import rmsprop_jax
from rmsprop_jax import diagnostics, dialects, storage

pytestmark = pytest.mark.extended

# Inside Optax's wrappers: the same as Optax's own RMSProp in the same wrapper, in configurations
# where the two agree.

RATE, DECAY, EPS, MOMENTUM, START = 0.02, 0.9, 1e-3, 0.5, 0.1
PAIRS = {
    'rmsprop': (
        rmsprop_jax.rmsprop(RATE, DECAY, EPS, START, momentum=MOMENTUM),
        optax.rmsprop(RATE, DECAY, EPS, START, momentum=MOMENTUM),
    ),
    'torch, centered': (
        dialects.torch(RATE, DECAY, EPS, momentum=MOMENTUM, centered=True),
        optax.chain(
            optax.scale_by_stddev(DECAY, EPS, eps_in_sqrt=False),
            optax.trace(MOMENTUM),
            optax.scale(-RATE),
        ),
    ),
}
LABELS = {'kernel': 'trained', 'bias': 'other', 'scale': 'trained'}
MASK = {'kernel': True, 'bias': False, 'scale': True}


def trained_part(wrap):
    return lambda tx: wrap({'trained': tx, 'other': optax.sgd(0.1)}, LABELS)


WRAPPERS = {
    'add_decayed_weights': lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
    'adaptive_grad_clip': lambda tx: optax.chain(optax.adaptive_grad_clip(0.01), tx),
    'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
    'clip': lambda tx: optax.chain(optax.clip(0.05), tx),
    'clip_by_block_rms': lambda tx: optax.chain(optax.clip_by_block_rms(0.1), tx),
    'clip_by_global_norm': lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
    'conditionally_mask': lambda tx: optax.conditionally_mask(tx, lambda n: n % 2 == 0),
    'ema': lambda tx: optax.chain(tx, optax.ema(0.8)),
    'flatten': optax.flatten,
    'keep_params_nonnegative': lambda tx: optax.chain(tx, optax.keep_params_nonnegative()),
    'lookahead': lambda tx: optax.lookahead(tx, 3, 0.5),
    'lookahead, reset': lambda tx: optax.lookahead(tx, 3, 0.5, reset_state=True),
    'masked': lambda tx: optax.masked(tx, MASK),
    'mechanize': lambda tx: optax.contrib.mechanize(tx, weight_decay=0.0),
    'MultiSteps': lambda tx: optax.MultiSteps(tx, 3).gradient_transformation(),
    'MultiSteps, skipping': lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    'multi_transform': trained_part(optax.multi_transform),
    'named_chain': lambda tx: optax.named_chain(('zero_nans', optax.zero_nans()), ('ours', tx)),
    'partition': trained_part(optax.partition),
    'reduce_on_plateau': lambda tx: optax.chain(
        tx, optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.5)
    ),
    'schedule_free': lambda tx: optax.contrib.schedule_free(tx, RATE, b1=0.9),
    'snapshot': lambda tx: optax.chain(tx, optax.snapshot('norm', optax.tree.norm)),
    'split_real_and_imaginary': optax.contrib.split_real_and_imaginary,
    'zero_nans': lambda tx: optax.chain(optax.zero_nans(), tx),
}
# Which of them are given a gradient that is not finite, at the fourth step.
GUARDED = {'apply_if_finite', 'MultiSteps, skipping', 'named_chain', 'zero_nans'}

X = np.random.default_rng(0).normal(size=(32, 3)).astype('float32')
Y = X @ np.array([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0]], 'float32') + 0.5


def tree() -> dict:
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
    return {'kernel': kernel, 'bias': jnp.full(2, 0.1), 'scale': jnp.float32(1.5)}


def loss(params: dict) -> jax.Array:
    return jnp.mean((X @ params['kernel'] * params['scale'] + params['bias'] - Y) ** 2)


def trained(tx, start, spoiled: bool, steps=12):
    """Parameters and losses of a run in one program."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, i):
        params, state = carry
        # Lookahead's parameters are a pair, of which the fast ones meet the data.
        value, grads = jax.value_and_grad(loss)(getattr(params, 'fast', params))
        grads['bias'] = jnp.where(spoiled & (i == 3), jnp.nan, grads['bias'])
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))
    return params, values


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('name', WRAPPERS)
def test_wrapped_as_optax_is(name, pair):
    start, wrap = tree(), WRAPPERS[name]
    start = optax.LookaheadParams.init_synced(start) if 'lookahead' in name else start
    run = jax.jit(lambda start: [trained(wrap(tx), start, name in GUARDED) for tx in PAIRS[pair]])
    ours, theirs = run(start)
    assert jnp.isfinite(ours[1]).all()
    assert any(
        jnp.any(p != q) for p, q in zip(*map(jax.tree.leaves, (ours[0], start)), strict=True)
    )
    # Optax's variance is a difference of rounded numbers, which the first steps feel.
    chex.assert_trees_all_close(ours, theirs, rtol=2e-4 if 'centered' in pair else 2e-5, atol=1e-6)


def test_compact_states_in_every_wrapper():
    """Each wrapper keeps the formats of the state, and a scan thus the types of its carry."""
    everywhere = storage.large_leaves(storage.bfloat16(), min_size=1, min_ndim=0)
    tx = rmsprop_jax.rmsprop(RATE, initial_scale=START, momentum=0.5, storage=everywhere)
    for name, wrap in WRAPPERS.items():
        start = tree()
        start = optax.LookaheadParams.init_synced(start) if 'lookahead' in name else start
        params, values = jax.eval_shape(
            lambda start, wrap=wrap: trained(wrap(tx), start, False), start
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(params, start)
        assert values.shape == (12,)


def test_schedule_free_evaluates_an_average():
    tx = optax.contrib.schedule_free(rmsprop_jax.rmsprop(0.05, 0.99, START), 0.05, b1=0.9)
    params = tree()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(300):
        params, state = step(params, state)
    assert loss(optax.contrib.schedule_free_eval_params(state, params)) < 0.01 * loss(tree())


# Hyperparameters in the state. tests/test_dialects.py does this with the dialects.

INJECTED = {
    'rmsprop': (
        rmsprop_jax.rmsprop,
        {'learning_rate': 0.1, 'decay': 0.8, 'eps': 1e-2, 'momentum': 0.5, 'weight_decay': 0.1},
    ),
    'scale_by_rms': (rmsprop_jax.scale_by_rms, {'decay': 0.8, 'eps': 1e-2, 'initial_scale': 0.3}),
    'scale_by_stddev': (
        rmsprop_jax.scale_by_stddev,
        {'decay': 0.8, 'eps': 1e-2, 'initial_scale': 0.3},
    ),
    'trace': (rmsprop_jax.trace, {'decay': 0.8}),
    'torch_clip_grad_norm': (dialects.torch_clip_grad_norm, {'max_norm': 0.1}),
}


@pytest.mark.parametrize('wrapper', ['ours', "optax's"])
@pytest.mark.parametrize('name', INJECTED)
def test_injected_numbers(name, wrapper):
    """Under jit, injected numbers give what they give directly, also after they have changed."""
    make, numbers = INJECTED[name]
    if wrapper == 'ours':
        inject = rmsprop_jax.inject_hyperparams(make)
    else:
        static = {'norm_type'} & set(make.__code__.co_varnames)
        inject = optax.inject_hyperparams(make, static, jnp.dtype('float32'))
    tx, start, grads = inject(**numbers), tree(), jax.grad(loss)(tree())
    if name == 'torch_clip_grad_norm' and wrapper != 'ours':
        tx = optax.inject_hyperparams(make.__wrapped__, {'norm_type'}, jnp.dtype('float32'))(
            **numbers
        )
    state, update = tx.init(start), jax.jit(tx.update)
    assert numbers.keys() <= state.hyperparams.keys()
    for factor in (1.0, 0.5):
        now = {key: factor * value for key, value in numbers.items()}
        direct = make(**now)
        # A start value is read by init alone.
        kept = {'initial_scale': numbers['initial_scale']} if 'initial_scale' in numbers else {}
        begun = make(**now | kept).init(start)
        expected, _ = direct.update(grads, begun, start)
        state.hyperparams.update({key: jnp.float32(value) for key, value in now.items()})
        got, _ = update(grads, state, start)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


# Model libraries: least squares, against NumPy alone.


def least_squares(kernel, bias, steps: int, train_bias: bool = True):
    """The same training in NumPy, in double precision: the loss's gradient, RMSProp, addition."""
    params = [np.array(kernel, float), np.array(bias, float)]
    nu = [np.full_like(p, START) for p in params]
    trace = [np.zeros_like(p) for p in params]
    for _ in range(steps):
        residual = 2 * (X @ params[0] + params[1] - Y) / Y.size
        for i, g in enumerate([X.T @ residual, residual.sum(0)][: 1 + train_bias]):
            nu[i] = DECAY * nu[i] + (1 - DECAY) * g**2
            trace[i] = MOMENTUM * trace[i] - RATE * g / np.sqrt(nu[i] + EPS)
            params[i] = params[i] + trace[i]
    return params


def squared_error(outputs: jax.Array) -> jax.Array:
    return jnp.mean((outputs - Y) ** 2)


def with_plain_jax(tx, kernel, bias, steps):
    params = {'kernel': kernel, 'bias': bias}
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.grad(lambda p: squared_error(X @ p['kernel'] + p['bias']))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.copy, (params, state))
    for _ in range(steps):
        params, state = step(params, state)
    return params['kernel'], params['bias']


def with_nnx(tx, kernel, bias, steps, wrt=nnx.Param):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    nnx.update(model, {'kernel': kernel, 'bias': bias})
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        difference = nnx.DiffState(0, wrt)
        grads = nnx.grad(lambda model: squared_error(model(X)), argnums=difference)(model)
        optimizer.update(model, grads)

    for _ in range(steps):
        step(model, optimizer)
    assert optimizer.step[...] == steps
    trained = nnx.to_pure_dict(nnx.state(model))
    return trained['kernel'], trained['bias']


def with_nnx_subset(tx, kernel, bias, steps):
    """Only kernels are trained, and only they have a state."""
    only = nnx.All(nnx.Param, nnx.PathContains('kernel'))
    return with_nnx(tx, kernel, bias, steps, wrt=only)


def with_linen(tx, kernel, bias, steps):
    model = linen.Dense(2)
    params = {'kernel': kernel, 'bias': bias}
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            return squared_error(state.apply_fn({'params': params}, X))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(steps):
        state = step(state)
    assert state.step == steps
    return state.params['kernel'], state.params['bias']


def with_equinox(tx, kernel, bias, steps):
    """A module with leaves that are no parameters: a function, and a counter."""
    eqx = pytest.importorskip('equinox')

    class Model(eqx.Module):
        linear: Any
        activation: object
        calls: jax.Array

        def __call__(self, x):
            return self.activation(self.linear(x))

    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    linear = eqx.tree_at(lambda x: (x.weight, x.bias), linear, (kernel.T, bias))
    model = Model(linear, lambda x: x, jnp.array(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: squared_error(jax.vmap(model)(X)))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = step(model, state)
    return model.linear.weight.T, model.linear.bias


LIBRARIES = {
    'plain JAX': with_plain_jax,
    'nnx': with_nnx,
    'nnx, kernels only': with_nnx_subset,
    'linen': with_linen,
    'equinox': with_equinox,
}
OURS = {
    'rmsprop': PAIRS['rmsprop'][0],
    'inject_hyperparams': rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(
        RATE, DECAY, EPS, START, momentum=MOMENTUM
    ),
    'measured': diagnostics.measured(PAIRS['rmsprop'][0], eps=EPS),
}


@pytest.mark.parametrize('optimizer', OURS)
@pytest.mark.parametrize('library', LIBRARIES)
def test_libraries_train_as_numpy_does(library, optimizer):
    kernel, bias = tree()['kernel'], tree()['bias']
    got = LIBRARIES[library](OURS[optimizer], kernel, bias, 10)
    expected = least_squares(kernel, bias, 10, train_bias=library != 'nnx, kernels only')
    assert np.abs(expected[0] - kernel).min() > 0.01
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# Mixed precision


def test_bfloat16_parameters_have_float32_statistics():
    """Computed and kept in bfloat16, with averages that are right to float32."""
    start = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree())
    tx = rmsprop_jax.rmsprop(RATE, 0.999, EPS, START)
    params, state = start, tx.init(start)
    nu = {name: np.full(p.shape, START) for name, p in start.items()}

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads, updates

    for _ in range(200):
        params, state, grads, updates = step(params, state)
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
        for name, g in grads.items():
            g = np.asarray(g, float)
            nu[name] = 0.999 * nu[name] + 0.001 * g**2
            expected = -RATE * g / np.sqrt(nu[name] + EPS)
            # One rounding to bfloat16.
            np.testing.assert_allclose(np.asarray(updates[name], float), expected, rtol=2**-8)
    for name, moment in optax.tree.get(state, 'nu').items():
        np.testing.assert_allclose(moment, nu[name], rtol=1e-5)


def test_bfloat16_computation_of_float32_parameters():
    """Master weights: parameters stay float32 and are cast where the loss is computed."""

    def train(dtype):
        def cast_loss(params):
            return loss(jax.tree.map(lambda p: p.astype(dtype), params)).astype(jnp.float32)

        tx = rmsprop_jax.rmsprop(optax.linear_schedule(0.05, 0.0, 200), momentum=0.5)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(cast_loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.jit(
            lambda start: jax.lax.scan(step, (start, tx.init(start)), length=200)
        )(tree())
        chex.assert_trees_all_equal_dtypes(params, tree())
        return loss(params)

    assert train(jnp.float32) < 1e-4
    # The kernel is as far off as bfloat16 rounds the loss.
    assert train(jnp.bfloat16) < 1e-3


@pytest.mark.parametrize('corrected', [False, True])
def test_a_static_loss_scale_is_an_epsilon(corrected):
    """Gradients times s, and epsilon and start value times s^2, take the same steps: with powers
    of two to the last bit."""
    scale = 2.0**10
    plain, scaled = (
        rmsprop_jax.rmsprop(RATE, DECAY, EPS * s**2, START * s**2, bias_correction=corrected)
        for s in (1.0, scale)
    )

    def final(tx, factor):
        params, state = tree(), tx.init(tree())
        update = jax.jit(tx.update)
        for _ in range(10):
            grads = jax.grad(lambda params: factor * loss(params))(params)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    chex.assert_trees_all_equal(final(scaled, scale), final(plain, 1.0))


def half_loss(params: dict) -> jax.Array:
    """In float16, so small that gradients underflow there."""
    half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    return (loss(half) * np.float16(2**-8)).astype(jnp.float32) * 2**-16


def unscaled_in_float32(tx, scale):
    """What people write: gradients come as float32, since the parameters are."""
    return optax.chain(optax.scale(1 / scale), tx)


@pytest.mark.parametrize(
    'build',
    [
        lambda tx, scale: unscaled_in_float32(tx, scale),
        lambda tx, scale: dialects.keras(
            RATE, DECAY, epsilon=0.0, momentum=MOMENTUM, loss_scale_factor=scale
        ),
    ],
    ids=['optax.scale', 'loss_scale_factor'],
)
def test_float16_with_a_static_loss_scale(build):
    scale = 2.0**20
    tx = build(rmsprop_jax.rmsprop(RATE, DECAY, 0.0, momentum=MOMENTUM), scale)

    def train(tx, scale, function):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda params: scale * function(params))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), length=20)[0][0])
        return run(tree())

    wide = rmsprop_jax.rmsprop(RATE, DECAY, 0.0, momentum=MOMENTUM)
    expected = train(wide, 1.0, loss)
    # Gradients are right to float16, and some of them are differences.
    chex.assert_trees_all_close(train(tx, scale, half_loss), expected, rtol=2e-2, atol=2e-2)
    # Without it most of them are zero.
    assert jnp.abs(train(wide, 1.0, half_loss)['kernel'] - expected['kernel']).max() > 0.1


def test_float16_with_a_dynamic_loss_scale():
    """Steps whose gradients overflow are left out, and the others are those of float32."""
    tx = optax.apply_if_finite(rmsprop_jax.rmsprop(RATE, DECAY, EPS, START), 100)
    scaling = dynamic_scale.DynamicScale(scale=2.0**24, growth_interval=5)

    def half(params):
        params = jax.tree.map(lambda p: p.astype(jnp.float16), params)
        return loss(params).astype(jnp.float16)

    @jax.jit
    def step(params, state, scaling):
        scaling, finite, _, grads = scaling.value_and_grad(half)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, scaling, finite

    wide = rmsprop_jax.rmsprop(RATE, DECAY, EPS, START)
    params, state = tree(), tx.init(tree())
    expected, wide_state = tree(), wide.init(tree())
    taken = []

    @jax.jit
    def wide_step(params, state):
        updates, state = wide.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(30):
        params, state, scaling, finite = step(params, state, scaling)
        taken.append(bool(finite))
        if finite:
            expected, wide_state = wide_step(expected, wide_state)
    assert not taken[0]
    assert 12 < sum(taken) < 30
    assert optax.tree.get(state, 'total_notfinite') == 30 - sum(taken)
    chex.assert_trees_all_close(params, expected, rtol=1e-2, atol=1e-2)
