"""Gradients that are not finite, squares that overflow, and what is skipped or mended then."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import rmsprop_jax
from rmsprop_jax import dialects, storage

SHAPE = (4, 5)
STEPS = 30
FAULTS = np.array([np.nan, np.inf, -np.inf], np.float32)
FORMS = {
    'plain': {},
    'outside': {'eps_in_sqrt': False, 'eps': 1e-3, 'initial_scale': 0.5},
    'centered': {'centered': True, 'initial_scale': 1.0, 'decay': 0.99},
    'momentum': {'momentum': 0.9},
    'everything': {'centered': True, 'initial_scale': 1.0, 'momentum': 0.5, 'nesterov': True},
}
each_form = pytest.mark.parametrize('form', FORMS)
BYTES = storage.large_leaves(storage.uint8(), min_size=1, min_ndim=0)
HALVES = storage.large_leaves(storage.bfloat16(), min_size=1, min_ndim=0)
MEANS = storage.per_statistic(nu=storage.large_leaves(storage.factored(), min_size=1))


def gradients(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(STEPS, *SHAPE)).astype(np.float32)


def spoilt(g: np.ndarray, share: float = 0.2) -> np.ndarray:
    """Gradients of which some entries are infinite or NaN, first steps included."""
    rng = np.random.default_rng(1)
    return np.where(rng.random(g.shape) < share, rng.choice(FAULTS, g.shape), g)


def assert_alike(got, expected) -> None:
    """Equal, but for a product and a sum that compilers contract in one program and not in another,
    or a mean that they add up in another order; steps are of the size of 0.1 to 1."""
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=3e-7)


def run(tx, g, state=None, params=None):
    """Updates of a sequence of gradients, and the state after it."""
    params = (
        jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), g) if params is None else params
    )

    def step(state, g):
        update, state = tx.update(g, state, params)
        return state, update

    state, updates = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(
        tx.init(params) if state is None else state, jax.tree.map(jnp.asarray, g)
    )
    return updates, state


@each_form
def test_a_skipped_coordinate_goes_on_as_if_the_step_had_not_been(form: str):
    """The steps that a coordinate takes are those of its finite gradients alone."""
    tx = rmsprop_jax.rmsprop(0.1, **FORMS[form])
    g = spoilt(gradients())
    taken = np.isfinite(g)
    # Each coordinate's finite gradients first, so that its k-th step is step k.
    order = np.argsort(~taken, axis=0, kind='stable')
    alone = np.take_along_axis(g, order, 0)
    expected = np.asarray(run(tx, np.where(np.isfinite(alone), alone, 0))[0])
    updates, state = run(rmsprop_jax.skip_nonfinite(tx), g)
    got = np.take_along_axis(np.asarray(updates), order, 0)
    done = np.take_along_axis(taken, order, 0)
    assert_alike(got[done], expected[done])
    assert not np.any(np.asarray(updates)[~taken])
    assert state.total_notfinite == np.sum(~taken)
    assert optax.tree.get(state, 'notfinite_count') is None


def test_skipping_equals_the_definition():
    """Beside the weighted means of `reference`, which know nothing of states."""
    options = {'decays': 0.9, 'eps': 1e-6, 'centered': True, 'initial_scale': 1.0}
    tx = rmsprop_jax.rmsprop(0.1, 0.9, 1e-6, 1.0, centered=True, momentum=0.9)
    g = spoilt(gradients(2))
    updates = np.asarray(run(rmsprop_jax.skip_nonfinite(tx), g)[0])
    for place in np.ndindex(SHAPE):
        column = g[:, *place]
        finite = np.isfinite(column)
        expected = reference.rmsprop_updates(column[finite], 0.1, 0.9, **options)
        np.testing.assert_allclose(updates[finite][:, *place], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('choice', [None, MEANS], ids=['float32', 'factored'])
def test_a_skipped_leaf_goes_on_as_if_the_step_had_not_been(choice):
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=choice)
    skipping = rmsprop_jax.skip_nonfinite(tx, 'leaf', storage=choice)
    g = {'a': gradients(3), 'b': gradients(4)}
    bad = [0, 7, 8, 20]
    g['a'][bad, 0, 1] = [np.nan, np.inf, -np.inf, np.nan]
    taken = np.delete(np.arange(STEPS), bad)
    updates, state = run(skipping, g)
    for name, steps in (('a', taken), ('b', slice(None))):
        expected, alone = run(tx, {name: g[name][steps]})
        got = [updates[name][steps], *(optax.tree.get(state, x)[name] for x in ('nu', 'trace'))]
        there = [expected[name], *(optax.tree.get(alone, x)[name] for x in ('nu', 'trace'))]
        assert_alike(got, there)
    assert not np.any(updates['a'][np.array(bad)])
    assert state.total_notfinite == len(bad)


def test_a_skipped_step_leaves_everything_as_it_is():
    tx = rmsprop_jax.rmsprop(lambda count: 0.1 / (1 + count), bias_correction=True, momentum=0.9)
    g = {'a': gradients(5), 'b': gradients(6)}
    g['a'][[0, 9], 1, 1] = np.nan, np.inf
    taken = np.delete(np.arange(STEPS), [0, 9])
    updates, state = run(rmsprop_jax.skip_nonfinite(tx, 'step'), g)
    expected, alone = run(tx, jax.tree.map(lambda x: x[taken], g))
    assert_alike(jax.tree.map(lambda x: x[taken], updates), expected)
    assert_alike(state.inner_state, alone)
    assert optax.tree.get(state, 'total_notfinite') == 2


@pytest.mark.parametrize('centered', [False, True])
def test_a_bias_corrected_average_stands_still_while_its_weight_grows(centered: bool):
    decay = np.float64(0.9)
    tx = rmsprop_jax.scale_by_rms(
        float(decay), 0.0, 0.3 * centered, bias_correction=True, centered=centered
    )
    g = spoilt(gradients(7), 0.3)
    g[0] = gradients(7)[0]
    updates, state = run(rmsprop_jax.skip_nonfinite(tx), g)
    # The averages themselves, normalised, in float64; a skipped one does not move.
    weight, mean, moment = 0.0, np.zeros(SHAPE), np.zeros(SHAPE)
    for t, x in enumerate(g.astype(np.float64)):
        after = decay * weight + (1 - decay)
        share, finite = (1 - decay) / after, np.isfinite(x)
        x = np.where(finite, x, 0)
        if centered:
            left = decay * (0.3 if t == 0 else moment * weight)
            spread = left + (1 - decay) * decay * weight * (x - mean) ** 2 / after
            new_mean, new = mean + share * (x - mean), spread / after
            mean = np.where(finite, new_mean, mean)
        else:
            new = moment + share * (x**2 - moment)
        moment = np.where(finite, new, moment)
        weight = after
        expected = x / np.sqrt(np.where(finite, new, 1))
        np.testing.assert_allclose(updates[t], expected, rtol=1e-4, atol=1e-6)
    name = 'var' if centered else 'nu'
    kept = optax.tree.get(state, name) / optax.tree.get(state, 'weight')
    np.testing.assert_allclose(kept, moment, rtol=1e-4)


@pytest.mark.parametrize('per', ['step', 'leaf', 'coordinate'])
@pytest.mark.parametrize('choice', [None, HALVES, BYTES, MEANS], ids=str)
def test_finite_gradients_pass_untouched(per: str, choice):
    if per == 'coordinate' and choice is MEANS:
        return
    tx = rmsprop_jax.scale_by_rms(0.99, bias_correction=True, storage=choice)
    g = gradients(8)
    updates, state = run(rmsprop_jax.skip_nonfinite(tx, per, storage=choice), g)
    assert_alike((updates, state.inner_state), run(tx, g))
    assert optax.tree.get(state, 'total_notfinite') == 0


@pytest.mark.parametrize('choice', [HALVES, BYTES], ids=['bfloat16', 'uint8'])
@pytest.mark.parametrize('per', ['leaf', 'coordinate'])
def test_rounded_averages_stand_still_in_the_mean(choice, per: str):
    """The unit decays under them; they are rounded anew at random, and right on average."""
    tx = rmsprop_jax.scale_by_rms(0.99, storage=choice)
    skipping = rmsprop_jax.skip_nonfinite(tx, per, storage=choice)
    size = 20_000
    g = np.random.default_rng(9).lognormal(sigma=2, size=(8, size)).astype(np.float32)
    _, state = run(skipping, {'a': g, 'b': g})
    before = storage.read(state, choice).inner_state.nu['a']
    bad = np.full((10, size), np.nan, np.float32)
    _, after = run(skipping, {'a': bad, 'b': g[[0] * 10]}, state)
    ratio = np.asarray(storage.read(after, choice).inner_state.nu['a'] / before, np.float64)
    error = ratio.std() / np.sqrt(size)
    assert abs(ratio.mean() - 1) < 4 * error
    assert 0 < ratio.std() < 0.6
    # What is not skipped goes on as in a run without faults, bit for bit.
    clean = {'a': np.zeros_like(bad), 'b': g[[0] * 10]}
    expected = run(tx, clean, state.inner_state)[1].nu['b']
    chex.assert_trees_all_equal(after.inner_state.nu['b'], expected)


def test_what_is_skipped_counts_as_zero_for_the_others():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), rmsprop_jax.rmsprop(0.1))
    g = gradients(10)
    g[3, 1, 2] = np.inf
    updates, _ = run(rmsprop_jax.skip_nonfinite(clipped), g)
    expected, _ = run(clipped, np.where(np.isfinite(g), g, 0))
    other = np.ones(SHAPE, bool)
    other[1, 2] = False
    np.testing.assert_allclose(updates[:, other], expected[:, other], rtol=1e-6)
    assert np.all(np.isfinite(updates))


def test_complex_numbers_are_skipped_whole():
    tx = dialects.torch(0.1, momentum=0.9)
    g = (gradients(11) + 1j * gradients(12)).astype(np.complex64)
    g[4, 0, 0] = complex(np.nan, 1)
    g[5, 0, 0] = complex(1, np.inf)
    updates, state = run(rmsprop_jax.skip_nonfinite(tx), g)
    taken = np.delete(np.arange(STEPS), [4, 5])
    alone, _ = run(tx, g[taken][:, :1, :1])
    np.testing.assert_allclose(updates[taken, :1, :1], alone, rtol=1e-6)
    assert not np.any(updates[4:6, 0, 0])
    assert state.total_notfinite == 2


def test_the_count_saturates():
    tx = rmsprop_jax.skip_nonfinite(rmsprop_jax.rmsprop(0.1))
    last = np.iinfo(np.int32).max
    bad = jnp.full(4, jnp.nan)
    state = tx.init(bad)._replace(total_notfinite=jnp.int32(last - 3))
    assert tx.update(bad, state)[1].total_notfinite == last


@pytest.mark.parametrize('make', [rmsprop_jax.rmsprop, optax.rmsprop], ids=['here', 'Optax'])
def test_without_it_faults_stay_in_their_coordinate_for_good(make):
    g = np.ones((50, 3), np.float32)
    g[0] = np.nan, np.inf, 1
    updates, _ = run(make(0.1), g)
    assert np.all(np.isnan(updates[:, 0]))
    assert np.all(updates[1:, 1] == 0)
    np.testing.assert_array_equal(updates[:, 2], run(make(0.1), g[:, 2:])[0][:, 0])


def _overflows(at: tuple[int, ...], g: np.ndarray) -> np.ndarray:
    g = g.copy()
    g[3, *at] = 1e30
    return g


@each_form
@pytest.mark.parametrize('choice', [None, HALVES], ids=['float32', 'bfloat16'])
def test_an_overflow_stops_its_coordinate_until_it_is_mended(form: str, choice):
    """Then it is bit for bit that of a run whose coordinate had no gradient before."""
    tx = rmsprop_jax.rmsprop(0.1, **FORMS[form], storage=choice)
    g = _overflows((1, 2), gradients(13))
    frozen, state = run(tx, g[:10])
    moving = np.ones(SHAPE, bool)
    moving[1, 2] = False
    if form == 'plain':
        assert not np.any(frozen[3:, 1, 2])
        peer, _ = run(optax.rmsprop(0.1), g)
        assert not np.any(peer[3:, 1, 2])
    broken = rmsprop_jax.nonfinite_entries(tx, state, g[0], choice)
    np.testing.assert_array_equal(broken, ~moving)
    mended = jax.jit(lambda s: rmsprop_jax.reset(tx, s, g[0], broken, choice))(state)
    updates, after = run(tx, g[10:], mended)
    quiet = g.copy()
    quiet[:10, 1, 2] = 0
    _, fresh = run(tx, quiet[:10])
    if FORMS[form].get('initial_scale', 0):
        # A start value would have decayed without gradients, too.
        fresh = rmsprop_jax.reset(tx, fresh, g[0], broken, choice)
    chex.assert_trees_all_equal((updates, after), run(tx, quiet[10:], fresh))
    assert np.all(np.isfinite(updates))
    assert np.all(np.asarray(updates)[:, 1, 2] != 0)


def test_a_factored_moment_is_mended_as_a_whole():
    tx = rmsprop_jax.rmsprop(0.1, storage=MEANS)
    params = {'a': jnp.zeros(SHAPE), 'b': jnp.zeros(SHAPE)}
    g = {'a': _overflows((1, 2), gradients(14)), 'b': gradients(15)}
    _, state = run(tx, jax.tree.map(lambda x: x[:10], g))
    entries = rmsprop_jax.nonfinite_entries(tx, state, params, MEANS)
    with pytest.raises(ValueError, match='as a whole only'):
        rmsprop_jax.reset(tx, state, params, entries)
    leaves = jax.tree.map(jnp.any, entries)
    assert jax.tree.map(bool, leaves) == {'a': True, 'b': False}
    mended = rmsprop_jax.reset(tx, state, params, leaves)
    updates, _ = run(tx, jax.tree.map(lambda x: x[10:], g), mended)
    expected, _ = run(tx, {'a': g['a'][10:]})
    assert_alike(updates['a'], expected['a'])


def test_bytes_recover_from_an_overflow_by_themselves():
    tx = rmsprop_jax.scale_by_rms(0.5, storage=BYTES)
    g = np.ones((60, 100), np.float32)
    g[0] = 1e30
    updates, _ = run(tx, g)
    np.testing.assert_allclose(updates[-1].mean(), 1, rtol=0.1)


def test_a_clipped_gradient_does_not_overflow():
    tx = optax.chain(optax.clip(1e18), rmsprop_jax.rmsprop(0.1))
    g = _overflows((1, 2), gradients(16))
    updates, state = run(tx, g)
    assert np.all(np.isfinite(optax.tree.get(state, 'nu')))
    assert np.all(np.asarray(updates)[:, 1, 2] != 0)


def test_refusals():
    tx = rmsprop_jax.rmsprop(0.1)
    with pytest.raises(TypeError, match="per must be one of 'step', 'leaf', 'coordinate'"):
        rmsprop_jax.skip_nonfinite(tx, 'entry')  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match='storage must be a format'):
        rmsprop_jax.skip_nonfinite(tx, storage='uint8')  # pyright: ignore[reportArgumentType]
    params = jnp.zeros(SHAPE)
    skip = rmsprop_jax.skip_nonfinite
    with pytest.raises(TypeError, match='SkipNonfiniteState that init returned, got tuple'):
        skip(tx).update(params, tx.init(params))
    for inner in (
        optax.MultiSteps(tx, 2).gradient_transformation(),
        dialects.keras(gradient_accumulation_steps=2),
    ):
        with pytest.raises(ValueError, match='accumulate around skip_nonfinite'):
            skip(inner).init(params)
    rounded = skip(rmsprop_jax.rmsprop(0.1, storage=BYTES))
    with pytest.raises(ValueError, match='give the storage'):
        rounded.update(params, rounded.init(params))
    factored = skip(rmsprop_jax.rmsprop(0.1, storage=MEANS), storage=MEANS)
    with pytest.raises(ValueError, match='as a whole only'):
        factored.update(params, factored.init(params))


@pytest.mark.parametrize('per', ['leaf', 'coordinate'])
def test_it_wraps_masks_and_other_optimizers(per: str):
    """Whatever keeps its statistics in the parameters' places can be wrapped."""
    params = {'a': jnp.ones(3), 'b': jnp.ones(2)}
    bad = {'a': jnp.array([1.0, jnp.nan, 2.0]), 'b': jnp.ones(2)}
    masked = optax.masked(rmsprop_jax.rmsprop(0.1), {'a': True, 'b': False})
    for inner in (masked, optax.adam(0.1), optax.sgd(0.1, momentum=0.9)):
        tx = rmsprop_jax.skip_nonfinite(inner, per)
        updates, state = jax.jit(tx.update)(bad, tx.init(params), params)
        chex.assert_tree_all_finite((updates, state))
        skipped = np.array([False, True, False]) | (per == 'leaf')
        np.testing.assert_array_equal(updates['a'] == 0, skipped)
        moments = jax.tree.leaves(optax.tree.map_params(inner, lambda x: x, state.inner_state))
        for moment in moments:
            if jnp.shape(moment) == (3,):
                np.testing.assert_array_equal(moment == 0, skipped)


def test_the_derivative_through_a_skipped_coordinate_is_finite():
    tx = rmsprop_jax.skip_nonfinite(rmsprop_jax.rmsprop(0.1))
    bad = jnp.array([1.0, jnp.nan])
    state = tx.init(bad)
    slope = jax.grad(lambda g: tx.update(g, state)[0].sum())(bad)
    assert np.isfinite(slope[0])
    assert slope[1] == 0
