"""Parameters rounded stochastically: the laws by enumeration, what holds them, and what is refused.

Ways of running it, masks, meshes and homes are in the table of `crossing.py`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import dialects, sharding, storage
from rmsprop_jax._parameters import _to_target

# Every number of the upper 16 bits, which are the ones that decide.
NOISE = np.arange(2**16, dtype=np.uint32)
LARGEST = float(jnp.finfo(jnp.bfloat16).max)


@pytest.fixture(params=['cpu', 'others'])
def form(request: Any, monkeypatch: Any) -> None:
    """CPUs round by bits, and others in float arithmetic."""
    if request.param == 'others':
        choose = lambda *args, cpu, default: default(*args)  # noqa: E731
        monkeypatch.setattr(jax.lax, 'platform_dependent', choose)


def narrow(x: Any) -> np.ndarray:
    """The nearest bfloat16 numbers, as float32."""
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float32)


def around(total: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bfloat16 numbers around a sum, towards zero and away from it, and 2^16 times its distance
    from the former over their distance."""
    total = np.asarray(total, np.float32)
    bits = total.view(np.uint32)
    inner, remainder = bits & np.uint32(0xFFFF0000), bits & np.uint32(0xFFFF)
    outer = np.where(remainder > 0, inner + np.uint32(0x10000), inner).astype(np.uint32)
    return inner.view(np.float32), outer.view(np.float32), remainder


def draws(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters in bfloat16, and updates from far smaller to somewhat larger ones."""
    rng = np.random.default_rng(0)
    p = narrow(rng.normal(size=count) * 2.0 ** rng.integers(-60, 100, count))
    u = p * rng.normal(size=count) * 2.0 ** rng.integers(-24, 3, count)
    # Some cancel all but a little of the parameter, and some move one that is zero.
    u[::8] = -p[::8] * (1 - 2.0 ** -rng.integers(1, 24, count)[::8])
    p[1::8] = 0
    return p, u.astype(np.float32)


def to_targets(p: Any, u: Any, bits: Any) -> jax.Array:
    # A program for each form.
    return jax.jit(lambda *arrays: _to_target(*arrays))(p, u, bits)


def take(tx: Any, params: Any, grads: Any, steps: int = 1) -> tuple[Any, Any]:
    """The updates and the state of the last of some steps on the same gradients and parameters."""
    both = grads, tx.init(params)
    for _ in range(steps):
        both = tx.update(grads, both[1], params)
    return both


# Laws


@pytest.mark.usefixtures('form')
def test_as_many_of_all_bits_round_up_as_the_remainder_says():
    p, u = draws(48)
    p = np.append(p, np.float32([1, 1, 2.0**-117, 0, 1.5, -LARGEST / 2]))
    u = np.append(u, np.float32([1e-3, -1e-3, 1e-37, 2e-35, 0, -LARGEST / 3]))
    total = p + u
    inner, outer, remainder = around(total)
    updates = np.asarray(to_targets(p[:, None], u[:, None], NOISE[None] << 16))
    rounded = narrow(p[:, None] + updates)
    up = (rounded == outer[:, None]) & (remainder > 0)[:, None]
    np.testing.assert_array_equal(up.sum(1), remainder)
    assert (up | (rounded == inner[:, None])).all()


@pytest.mark.usefixtures('form')
def test_no_update_changes_no_parameter():
    """Every bfloat16 number, whatever the bits. Subnormals count as zero."""
    params = jax.lax.bitcast_convert_type(NOISE.astype(np.uint16), jnp.bfloat16)
    p = np.asarray(params, np.float32)
    expected = np.where(np.abs(p) < 2.0**-126, 0, p)
    for bits in (0, 2**32 - 1):
        updates = to_targets(p, np.zeros_like(p), np.full(p.shape, bits, np.uint32))
        found = np.asarray(optax.apply_updates(params, updates), np.float32)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures('form')
def test_ends():
    """Infinities and NaN pass, finite sums stay finite, and small sums are left to the addition."""
    inf, nan, tiny = np.inf, np.nan, 2.0**-126
    p, u, expected = np.array(
        [
            (1, inf, inf),
            (1, -inf, -inf),
            (inf, 0, inf),
            (-inf, 1, -inf),
            (inf, -inf, nan),
            (1, nan, nan),
            (nan, 0, nan),
            (LARGEST, 1e36, LARGEST),
            (-LARGEST, -1e36, -LARGEST),
            (LARGEST, LARGEST, inf),
            (tiny, tiny, 2 * tiny),
            (1, -1, 0),
            (0, 2.0**-119, 2.0**-119),
        ],
        np.float32,
    ).T
    updates = to_targets(p, u, np.full(p.shape, 2**32 - 1, np.uint32))
    found = optax.apply_updates(jnp.asarray(p, jnp.bfloat16), updates)
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


def test_the_sum_is_that_of_float32():
    """The error that `p + u` has before it is rounded: half a unit in its last place."""
    p, u = draws(1000)
    exact = p.astype(np.float64) + u
    assert (np.abs((p + u) - exact) <= 2.0**-24 * np.abs(exact)).all()
    # So an update below 2^-25 of its parameter may be lost, and no larger one.
    assert np.float32(1) + np.float32(2.0**-25) == 1
    assert np.float32(1) + np.float32(1.001 * 2.0**-24) > 1


def test_a_parameter_moves_by_the_sum_of_its_updates():
    """A bfloat16 of 1 that gets 100 updates of 0.001: rounded to nearest it stays 1."""

    def train(tx: Any, params: jax.Array) -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jnp.full(params.shape, -1e-3), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    start, sgd = jnp.ones(2**14, jnp.bfloat16), optax.sgd(1.0)
    assert (train(sgd, start) == 1).all()
    found = np.asarray(train(rmsprop_jax.round_parameters(sgd), start), np.float64)
    # Each step moves by 2^-7 with a probability of 0.128.
    deviation = 2.0**-7 * np.sqrt(100 * 0.128 * 0.872)
    assert found.std() == pytest.approx(deviation, rel=0.05)
    assert abs(found.mean() - 1.1) < 4 * deviation / 2**7


# What applies updates


def rounded_targets() -> tuple[Any, Any, Any, np.ndarray]:
    """Parameters, gradients, a transformation, and where it leads, by its definition."""
    p, u = draws(2**16)
    params = {'w': jnp.asarray(p, jnp.bfloat16)}
    tx = rmsprop_jax.round_parameters(optax.sgd(1.0), seed=3)
    kept = storage.bfloat16(seed=3)
    noise = np.asarray(kept.bits(kept.key("parameter['w']"), 0, p.shape)) >> 16
    inner, outer, remainder = around(p + u)
    target = np.where(remainder + noise >= 2**16, outer, inner)
    return params, {'w': jnp.asarray(-u)}, tx, target


class Model(nnx.Module):
    def __init__(self, w: jax.Array):
        self.w = nnx.Param(w)


def by_optax(params: Any, grads: Any, tx: Any) -> Any:
    return optax.apply_updates(params, take(tx, params, grads)[0])['w']


def by_nnx(params: Any, grads: Any, tx: Any) -> Any:
    model = Model(params['w'])
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, nnx.State({'w': nnx.Param(grads['w'])}))
    return model.w[...]


def by_train_state(params: Any, grads: Any, tx: Any) -> Any:
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)  # pyright: ignore[reportArgumentType]
    return state.apply_gradients(grads=grads).params['w']


@pytest.mark.parametrize('apply', [by_optax, by_nnx, by_train_state])
def test_parameters_become_the_target_exactly(apply: Any):
    params, grads, tx, target = rounded_targets()
    found = apply(params, grads, tx)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), target)


def test_equinox_would_widen_the_model():
    """`equinox.apply_updates` adds without a cast; `optax.apply_updates` takes its models too."""
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0), dtype=jnp.bfloat16)
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = rmsprop_jax.round_parameters(rmsprop_jax.rmsprop(1e-3))
    updates, _ = take(tx, params, params)
    assert eqx.apply_updates(model, updates).weight.dtype == jnp.float32
    params, static = eqx.partition(model, eqx.is_inexact_array)
    model = eqx.combine(optax.apply_updates(params, updates), static)
    assert model.weight.dtype == jnp.bfloat16
    assert model(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


# What is wrapped


def test_what_is_wrapped_sees_float32():
    """Of bfloat16 parameters; anything else is handed on as it is."""
    seen = []

    def update(updates: Any, params: Any) -> Any:
        seen.append(jax.tree.map(lambda x: jnp.dtype(x), (updates, params)))
        return updates

    tx = rmsprop_jax.round_parameters(optax.stateless(update))
    params = {'b': jnp.ones(2, jnp.bfloat16), 'f': jnp.ones(2), 'h': jnp.ones(2, jnp.float16)}
    grads = {**params, 'f': jnp.ones(2, jnp.bfloat16)}
    updates, _ = take(tx, params, grads)
    dtypes = {name: x.dtype for name, x in updates.items()}
    assert dtypes == {'b': jnp.float32, 'f': jnp.bfloat16, 'h': jnp.float16}
    assert seen[-1] == (dtypes, {'b': jnp.float32, 'f': jnp.float32, 'h': jnp.float16})


CHAINS = {
    'weight decay': lambda: rmsprop_jax.rmsprop(0.03, weight_decay=0.1),
    'clipping by norm': lambda: optax.chain(
        optax.clip_by_global_norm(0.1), rmsprop_jax.rmsprop(0.03)
    ),
    'an average in their place': lambda: dialects.keras(
        0.03, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=1
    ),
    'clipping of parameters': lambda: dialects.mxnet(0.03, clip_weights=1.5),
    "Optax's": lambda: optax.adamw(0.03),
}


@pytest.mark.parametrize('name', CHAINS)
def test_parameters_lie_around_those_of_the_chain_in_float32(name: str):
    tx = CHAINS[name]()
    p = np.linspace(-2, 3, 1000).astype(jnp.bfloat16)
    params, grads = {'w': p}, {'w': np.sin(3 * p.astype(np.float32)).astype(jnp.bfloat16)}
    wide = {'w': jnp.asarray(narrow(p))}
    rounding = rmsprop_jax.round_parameters(tx)
    updates, state = rounding.update(grads, rounding.init(wide), params)
    found = np.asarray(optax.apply_updates(params, updates)['w'], np.float32)
    updates, after = take(tx, wide, {'w': narrow(grads['w'])})
    inner, outer, remainder = around(wide['w'] + updates['w'])
    # Where a sum differs in its last place from one program to the other.
    near = np.minimum(remainder, 2**16 - remainder) <= 2
    assert (near | (found == inner) | (found == outer)).all()
    assert (found == inner).any()
    assert (found == outer).any()
    for x, y in zip(jax.tree.leaves(state.inner_state), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    if name == 'clipping of parameters':
        assert np.abs(found).max() == 1.5


def test_clipping_to_what_bfloat16_does_not_have_may_be_passed_by_one_number():
    tx = rmsprop_jax.round_parameters(dialects.mxnet(1.0, clip_weights=0.1))
    params = jnp.zeros(1000, jnp.bfloat16)
    updates, _ = take(tx, params, -jnp.ones(1000))
    inner, outer, _ = around(np.float32(0.1))
    assert set(np.asarray(optax.apply_updates(params, updates), np.float32)) == {
        float(inner),
        float(outer),
    }


@pytest.mark.extended
def test_steps_are_skipped_inside():
    """`optax.apply_if_finite` wants updates in the gradients' dtype: outside, it is an error."""
    params = {
        'w': np.linspace(-1, 1, 64).astype(jnp.bfloat16),
        'empty': np.ones((0, 3), jnp.bfloat16),
    }
    grads = jax.tree.map(lambda p: np.full_like(p, np.nan), params)
    rounding, if_finite = rmsprop_jax.round_parameters, lambda tx: optax.apply_if_finite(tx, 3)
    updates, _ = take(rounding(if_finite(optax.sgd(0.1))), params, grads)
    jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), params)
    with pytest.raises(TypeError, match='cond branches must have equal output types'):
        take(if_finite(rounding(optax.sgd(0.1))), params, grads)


def test_other_leaves_are_as_without_it():
    params = {'w': jnp.linspace(0.5, 2, 6), 'c': jnp.ones(2, jnp.complex64)}
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9)
    updates, state = take(rmsprop_jax.round_parameters(tx), params, params, 2)
    expected, after = take(tx, params, params, 2)
    jax.tree.map(np.testing.assert_array_equal, (updates, state.inner_state), (expected, after))


# Bits


def test_bits_depend_on_seed_step_and_path():
    params = {name: jnp.ones(1000, jnp.bfloat16) for name in ('v', 'w')}
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-9), params)

    def updates(seed: int = 0, steps: int = 1, like: Any = params) -> Any:
        tx = rmsprop_jax.round_parameters(optax.sgd(1.0), seed=seed)
        return take(tx, like, {name: grads[name] for name in like}, steps)[0]

    first = updates()
    others = [first['v'], updates(1)['w'], updates(steps=2)['w']]
    for other in others:
        assert 0.3 < (other == first['w']).mean() < 0.7
    # Not on what else is in the tree.
    np.testing.assert_array_equal(updates(like={'w': params['w']})['w'], first['w'])
    halves = optax.partition(
        {name: rmsprop_jax.round_parameters(optax.sgd(1.0)) for name in params},
        {name: name for name in params},
    )
    jax.tree.map(np.testing.assert_array_equal, take(halves, params, grads)[0], first)


@pytest.mark.parametrize('outside', [False, True])
def test_results_do_not_depend_on_the_mesh_or_on_zero1(outside: bool):
    """Whether the state is split inside of it or around it."""
    p = np.linspace(-2, 3, 96).astype(jnp.bfloat16).reshape(8, 12)
    params = jax.device_put({'w': p}, NamedSharding(jax.make_mesh((4,), ('data',)), P()))
    tx = rmsprop_jax.rmsprop(0.03, weight_decay=0.1)
    expected, _ = take(rmsprop_jax.round_parameters(tx), {'w': p}, {'w': p})
    inner = tx if outside else sharding.zero1(tx, params)
    split = rmsprop_jax.round_parameters(inner)
    split = sharding.zero1(split, params) if outside else split
    state = jax.jit(split.init)(params)
    assert optax.tree.get(state, 'nu')['w'].sharding.spec[0] == 'data'
    updates, _ = jax.jit(split.update)(params, state, params)
    np.testing.assert_array_equal(updates['w'], expected['w'])


def test_the_derivative_goes_straight_through():
    p, u = draws(64)
    bits = np.full(64, 2**31, np.uint32)
    tangents = np.ones_like(p), np.arange(64, dtype=np.float32), np.zeros(64, jax.dtypes.float0)
    _, found = jax.jit(lambda *primals: jax.jvp(_to_target, primals, tangents))(p, u, bits)
    np.testing.assert_array_equal(found, tangents[1])


# What is refused


def test_updates_that_are_rounded_already_are_refused():
    inner = optax.chain(
        rmsprop_jax.rmsprop(0.1),
        optax.stateless(lambda updates, _: optax.tree.cast(updates, jnp.bfloat16)),
    )
    params = {'dense': {'kernel': jnp.ones((2, 2), jnp.bfloat16)}}
    with pytest.raises(
        TypeError, match=r"inner's updates\['dense'\]\['kernel'\] has dtype bfloat16"
    ):
        take(rmsprop_jax.round_parameters(inner), params, params)


def test_complex_updates_are_refused_as_such():
    tx, params = rmsprop_jax.round_parameters(optax.sgd(0.1)), jnp.ones(2, jnp.bfloat16)
    with pytest.raises(TypeError, match="inner's updates has dtype complex64, but"):
        take(tx, params, jnp.ones(2, jnp.complex64))


def test_updates_unlike_the_parameters_are_refused():
    """Broadcast, they would change a parameter's shape, or its entries by the same amount."""
    params = {'v': jnp.ones(2, jnp.bfloat16), 'w': jnp.ones(2)}
    changes = {
        r"inner's updates\['v'\] has shape \(\), but params has \(2,\)": jnp.sum,
        r"inner's updates\['v'\] has shape \(1, 2\), but params has \(2,\)": lambda x: x[None],
        r"only in params: \['v'\], \['w'\]": lambda _: None,
    }
    for message, change in changes.items():
        inner = optax.stateless(lambda u, _, change=change: jax.tree.map(change, u))
        with pytest.raises(ValueError, match=message):
            take(rmsprop_jax.round_parameters(inner), params, params)


@pytest.mark.parametrize('outer', [rmsprop_jax.round_parameters, rmsprop_jax.cautious])
def test_changing_rounded_updates_is_refused(outer: Any):
    once = rmsprop_jax.round_parameters(rmsprop_jax.rmsprop(0.1))
    with pytest.raises(ValueError, match='inner rounds parameters itself'):
        outer(optax.chain(once)).init(jnp.ones(2))


def test_a_state_that_would_become_wider_is_refused():
    """Optax's second moment has the dtype of the parameters that init is given."""
    tx, params = rmsprop_jax.round_parameters(optax.rmsprop(0.1)), jnp.ones(2, jnp.bfloat16)
    with pytest.raises(TypeError, match=r'\.nu is bfloat16 and would become float32'):
        take(tx, params, params)
    tx.update(params, tx.init(optax.tree.cast(params, jnp.float32)), params)


def test_a_state_that_gets_another_leaf_is_not_taken_for_wider():
    params = jnp.ones(2, jnp.bfloat16)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, {'last': updates, **state}

    inner = optax.GradientTransformation(lambda _: {'steps': jnp.zeros([], jnp.int32)}, update)
    _, state = take(rmsprop_jax.round_parameters(inner), params, params)
    assert state.inner_state['last'].dtype == jnp.float32
