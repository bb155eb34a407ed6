"""The learning rate that is read is the one that the next step uses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rmsprop_jax
from rmsprop_jax import dialects, recipes, rmsprop, sharding
from rmsprop_jax.diagnostics import learning_rates, measured
from rmsprop_jax.dialects._record import functions

PARAMS = {'a': jnp.ones(3), 'b': {'c': jnp.ones((2, 2))}}
SCHEDULE = optax.piecewise_constant_schedule(0.5, {2: 0.5, 4: 0.5})


def read_along(tx, steps=6, params=PARAMS):
    """The rates before each of some steps."""
    state, found = tx.init(params), []
    for _ in range(steps):
        found.append(learning_rates(tx, state, params))
        _, state = tx.update(params, state, params)
    return found


WRAPPERS = {
    'itself': lambda tx: tx,
    'chain': lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    'masked': lambda tx: optax.masked(tx, {'a': True, 'b': True}),
    'named_chain': lambda tx: optax.named_chain(('ours', tx)),
    'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
    'skip_nonfinite': rmsprop_jax.skip_nonfinite,
    'skip whole steps': lambda tx: rmsprop_jax.skip_nonfinite(tx, 'step'),
    'round_parameters': rmsprop_jax.round_parameters,
    'measured': measured,
    'zero1': lambda tx: sharding.zero1(
        tx,
        PARAMS,
        jax.sharding.NamedSharding(jax.make_mesh((1,), ('data',)), jax.sharding.PartitionSpec()),
    ),
    'several': lambda tx: optax.chain(optax.clip(1.0), measured(optax.apply_if_finite(tx, 3))),
}


@pytest.mark.parametrize(
    'wrap',
    [
        pytest.param(wrap, id=name, marks=() if name == 'chain' else pytest.mark.extended)
        for name, wrap in WRAPPERS.items()
    ],
)
def test_a_schedule_in_wrappers(wrap):
    for found, rate in zip(
        read_along(wrap(rmsprop(SCHEDULE))), [0.5, 0.5, 0.25, 0.25, 0.125, 0.125], strict=True
    ):
        assert found == {'a': rate, 'b/c': rate}


@pytest.mark.extended
@pytest.mark.parametrize('name', sorted(functions()))
def test_every_dialect(name):
    function = functions()[name]
    first = 'lr' if name in ('torch', 'stable_baselines3', 'timm') else 'learning_rate'
    assert [x['a'] for x in read_along(function(**{first: SCHEDULE}), 3)] == [0.5, 0.5, 0.25]
    tx, double = (function(**{first: rate}) for rate in (0.25, 0.5))
    state = tx.init(PARAMS)
    assert learning_rates(tx, state, PARAMS)['a'] == 0.25
    # What is read is what a first step is in proportion to.
    steps = [x.update(PARAMS, state, PARAMS)[0]['a'] for x in (tx, double)]
    np.testing.assert_allclose(steps[1], 2 * steps[0], rtol=1e-6)


def test_what_is_injected_and_changed():
    tx = optax.chain(rmsprop_jax.inject_hyperparams(rmsprop)(SCHEDULE, momentum=0.9))
    assert [x['a'] for x in read_along(tx)] == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    tx = optax.inject_hyperparams(rmsprop)(0.1)
    state = tx.init(PARAMS)
    state.hyperparams['learning_rate'] = jnp.float32(0.75)
    assert learning_rates(tx, state, PARAMS)['a'] == 0.75


def test_groups_have_their_own():
    members = {'x': dialects.torch(0.25), 'y': rmsprop(SCHEDULE), 'z': optax.sgd(1.0)}
    tx = optax.partition(members, {'a': 'x', 'b': 'y', 'c': 'z', 'd': 'y'})
    params = {name: jnp.ones(2) for name in 'abcd'}
    assert read_along(tx, 3, params)[2] == {'a': 0.25, 'b': 0.25, 'd': 0.25}
    assert read_along(tx, 3, params)[1] == {'a': 0.25, 'b': 0.5, 'd': 0.5}


@pytest.mark.extended
def test_accumulated_steps():
    """Steps that a call does not take have a rate, too: that of the step to come."""
    tx = optax.MultiSteps(rmsprop(SCHEDULE), 2)
    assert [x['a'] for x in read_along(tx, 8)] == [0.5] * 4 + [0.25] * 4
    skipping = optax.MultiSteps(
        rmsprop(SCHEDULE), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation()
    assert [x['a'] for x in read_along(skipping, 8)] == [0.5] * 4 + [0.25] * 4
    inside = optax.chain(optax.clip(1.0), skipping)
    assert [x['a'] for x in read_along(inside, 3)] == [0.5] * 3
    # Keras evaluates a schedule at the call that takes the step.
    ours = dialects.keras(lambda count: 1.0 * count, gradient_accumulation_steps=3)
    assert [x['a'] for x in read_along(ours, 7)] == [2, 2, 2, 5, 5, 5, 8]


def test_rates_that_depend_on_more_than_a_count():
    tx = dialects.keras_legacy(0.5, decay=1.0)
    np.testing.assert_allclose([x['a'] for x in read_along(tx, 3)], [0.5, 0.25, 0.5 / 3])
    tx = optax.chain(rmsprop(0.5), optax.contrib.reduce_on_plateau(patience=1))
    assert learning_rates(tx, tx.init(PARAMS), PARAMS, value=1.0)['a'] == 0.5


@pytest.mark.extended
def test_recipes():
    tx = recipes.efficientnet(steps_per_epoch=100, batch_size=256)
    state = tx.init(PARAMS)
    found = learning_rates(tx, state, PARAMS)
    assert {*found} == {'a', 'b/c'}
    later = jax.tree.map(lambda x: jnp.full_like(x, 500) if x.dtype == jnp.int32 else x, state)
    np.testing.assert_allclose(learning_rates(tx, later, PARAMS)['a'], 0.016 * 0.97**2, rtol=1e-6)


def test_programs_that_nobody_looks_into_hold_no_mark():
    tx = rmsprop(SCHEDULE)
    state = tx.init(PARAMS)
    before = str(jax.make_jaxpr(tx.update)(PARAMS, state))
    learning_rates(tx, state, PARAMS)
    assert str(jax.make_jaxpr(tx.update)(PARAMS, state)) == before
    assert 'rmsprop_jax:' not in before


def test_in_jit_and_of_traced_rates():
    @jax.jit
    def read(rate, state):
        return learning_rates(optax.chain(rmsprop(rate)), state, PARAMS)

    assert read(0.3, optax.chain(rmsprop(0.1)).init(PARAMS))['a'] == jnp.float32(0.3)
    tx = rmsprop(SCHEDULE)

    @jax.jit
    def run(state):
        def step(state, _):
            rate = learning_rates(tx, state, PARAMS)['a']
            return tx.update(PARAMS, state)[1], rate

        return jax.lax.scan(step, state, length=5)[1]

    assert run(tx.init(PARAMS)).tolist() == [0.5, 0.5, 0.25, 0.25, 0.125]


def test_in_flax_nnx():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(rmsprop(SCHEDULE)), wrt=nnx.Param)
    for rate in (0.5, 0.5, 0.25):
        params = nnx.state(model, nnx.Param)
        found = learning_rates(optimizer.tx, optimizer.opt_state, params)
        assert found == {'bias': rate, 'kernel': rate}
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model))


def test_nothing_of_the_step_is_run():
    """Gradients and parameters that would make NaN do not, where JAX looks for them."""
    tx = rmsprop(SCHEDULE)
    infinite = jax.tree.map(lambda p: p * jnp.inf, PARAMS)
    with jax.debug_nans(True):
        assert learning_rates(tx, tx.init(PARAMS), infinite)['a'] == 0.5
        with pytest.raises(FloatingPointError):
            tx.update(infinite, tx.init(PARAMS), infinite)


def test_what_has_no_rate_or_two():
    without = optax.chain(rmsprop_jax.scale_by_rms(), optax.scale(-0.1))
    with pytest.raises(ValueError, match='tx has no learning rate that'):
        learning_rates(without, without.init(PARAMS), PARAMS)
    twice = optax.chain(rmsprop(0.1), rmsprop(0.1))
    with pytest.raises(ValueError, match=r"params\['a'\] has more than one learning rate"):
        learning_rates(twice, twice.init(PARAMS), PARAMS)
