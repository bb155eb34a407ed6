"""Gradients that are not finite, squares that overflow, and what is skipped or mended then."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import rmsprop_jax
from rmsprop_jax import diagnostics, dialects, storage

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


@pytest.mark.extended
@pytest.mark.parametrize(
    ('per', 'choice'),
    [
        *itertools.product(['step', 'leaf', 'coordinate'], [None, HALVES, BYTES]),
        # A factored moment has no coordinates.
        *itertools.product(['step', 'leaf'], [MEANS]),
    ],
    ids=str,
)
def test_finite_gradients_pass_untouched(per: str, choice):
    tx = rmsprop_jax.scale_by_rms(0.99, bias_correction=True, storage=choice)
    g = gradients(8)
    updates, state = run(rmsprop_jax.skip_nonfinite(tx, per, storage=choice), g)
    assert_alike((updates, state.inner_state), run(tx, g))
    assert optax.tree.get(state, 'total_notfinite') == 0


@pytest.mark.extended
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


@pytest.mark.extended
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


CORRECTED = {
    'corrected': {'bias_correction': True},
    'corrected, centered': {'bias_correction': True, 'centered': True, 'initial_scale': 1.0},
    'corrected, everything': {**FORMS['everything'], 'bias_correction': True},
}
HALF = STEPS // 2


def spoil(g, entries):
    """Gradients that break entries for good at the fourth step, by turns in one of four ways."""
    ways = itertools.cycle([1e30, -1e25, np.nan, -np.inf])

    def leaf(x, bad):
        x = x.copy()
        for place in np.argwhere(bad):
            x[3, *place] = next(ways)
        return x

    return jax.tree.map(leaf, g, entries)


def assert_mended(tx, g, entries, choice=None, start=lambda state: state):
    """After a reset the run is bit for bit one in which what is broken had no gradient before.

    `start` undoes what steps without gradients do to start values.
    """
    first, last = (jax.tree.map(lambda x, h=h: x[h], g) for h in (np.s_[:HALF], np.s_[HALF:]))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), g)

    @jax.jit
    def steps(state, g):
        return jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], state, g)[::-1]

    @jax.jit
    def mended(state):
        broken = rmsprop_jax.nonfinite_entries(tx, state, params, choice)
        return broken, rmsprop_jax.reset(tx, state, params, broken, choice)

    frozen, state = steps(tx.init(params), first)
    broken, state = mended(state)
    chex.assert_trees_all_equal(broken, entries)
    quiet = jax.tree.map(lambda x, bad: np.where(bad, 0, x), first, entries)
    fresh = start(steps(tx.init(params), quiet)[1])
    updates, after = steps(state, last)
    chex.assert_trees_all_equal((updates, after), steps(fresh, last))
    chex.assert_tree_all_finite(updates)
    for bad, u in zip(*map(jax.tree.leaves, (entries, updates)), strict=True):
        assert np.all(np.asarray(u)[-1][bad] != 0)
    return frozen


BROKEN = np.zeros(SHAPE, bool)
BROKEN[[1, 0, 2, 3], [2, 0, 3, 4]] = True


@pytest.mark.extended
@pytest.mark.parametrize('form', [*FORMS, *CORRECTED])
@pytest.mark.parametrize('choice', [None, HALVES], ids=['float32', 'bfloat16'])
def test_an_overflow_stops_its_coordinate_until_it_is_mended(form: str, choice):
    options = {**FORMS, **CORRECTED}[form]
    tx = rmsprop_jax.rmsprop(0.1, **options, storage=choice)

    def start(state):
        """What `initial_scale` says, written into a state by hand."""
        name = 'var' if options.get('centered') else 'nu'
        moment, unit = (optax.tree.get(state, x) for x in (name, 'unit'))
        fresh = options.get('initial_scale', 0.0) / (1.0 if unit is None else unit)
        return optax.tree.set(
            state, **{name: jnp.where(BROKEN, jnp.asarray(fresh, moment.dtype), moment)}
        )

    frozen = assert_mended(tx, spoil(gradients(13), BROKEN), BROKEN, choice, start)
    # Until then no gradient moves what has overflowed; a velocity coasts.
    frozen = np.asarray(frozen)[3:, [1, 0], [2, 0]]
    coasting = options.get('momentum', 0.0) * frozen[:-1]
    np.testing.assert_allclose(frozen[1:], coasting, rtol=2.0**-6 if choice else 1e-6)


EVERYTHING = {'centered': True, 'momentum': 0.5, 'nesterov': True, 'bias_correction': True}
WRAPPERS = {
    'chain': lambda tx, _: optax.chain(optax.scale(0.5), tx, optax.scale(2.0)),
    'partition': lambda tx, _: optax.partition(
        {'ours': tx, 'theirs': optax.sgd(0.1)}, {'a': 'ours', 'rest': 'theirs'}
    ),
    'masked': lambda tx, _: optax.masked(tx, {'a': True, 'rest': False}),
    'MultiSteps': lambda tx, _: optax.MultiSteps(tx, 3).gradient_transformation(),
    'measured': lambda tx, choice: diagnostics.measured(tx, storage=choice),
    **{
        f'skip_nonfinite, {per}': lambda tx, choice, per=per: rmsprop_jax.skip_nonfinite(
            optax.masked(tx, {'a': True, 'rest': False}), per, storage=choice
        )
        for per in ('coordinate', 'leaf', 'step')
    },
    'inject_hyperparams': lambda _, choice: rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(
        0.1, **EVERYTHING, storage=choice
    ),
    "Optax's inject_hyperparams": lambda _, choice: optax.inject_hyperparams(
        lambda learning_rate: rmsprop_jax.rmsprop(learning_rate, **EVERYTHING, storage=choice)
    )(0.1),
}


@pytest.mark.extended
@pytest.mark.parametrize(
    ('name', 'choice'),
    [*((name, None) for name in WRAPPERS), ('partition', HALVES), ('skip_nonfinite, leaf', HALVES)],
    ids=lambda x: x if isinstance(x, str) else 'bfloat16' if x else 'float32',
)
def test_what_has_overflowed_is_mended_in_every_wrapper(name: str, choice):
    """A mask may leave out a branch of the parameters as a whole."""
    tx = WRAPPERS[name](rmsprop_jax.rmsprop(0.1, **EVERYTHING, storage=choice), choice)
    g = {'a': gradients(17), 'rest': {'b': gradients(18)[:, 0], 'c': gradients(19)[:, 0, 0]}}
    entries = jax.tree.map(lambda x: np.zeros(x.shape[1:], bool), g)
    entries['a'][[1, 2], [2, 0]] = True
    assert_mended(tx, spoil(g, entries), entries, choice)


@pytest.mark.extended
@pytest.mark.parametrize('pairs', [True, False], ids=['pairs', 'one magnitude'])
@pytest.mark.parametrize('skipping', [True, False], ids=['skipping', 'plain'])
def test_complex_numbers_are_mended_whole(pairs: bool, skipping: bool):
    """Where one of the two parts has overflowed, both start again."""
    make = dialects.torch if pairs else rmsprop_jax.rmsprop
    tx = make(0.1, centered=True, momentum=0.9)
    tx = rmsprop_jax.skip_nonfinite(tx) if skipping else tx
    matrix = (gradients(20) + 1j * gradients(21)).astype(np.complex64)
    g = {'matrix': matrix, 'number': matrix[:, 0, 0].copy(), 'real': gradients(22)}
    entries = jax.tree.map(lambda x: np.zeros(x.shape[1:], bool), g)
    entries['matrix'][2, 3] = entries['number'][...] = entries['real'][0, 1] = True
    g['matrix'][3, 2, 3] = complex(1, 1e30)
    g['number'][3] = complex(-1e30, 1)
    g['real'][3, 0, 1] = 1e30
    assert_mended(tx, g, entries)


def test_statistics_without_entries_mark_the_whole_parameter():
    """As the rows and columns of Optax's factored moments do, also where their shapes would fit."""
    tx, params = optax.scale_by_factored_rms(min_dim_size_to_factor=2), jnp.ones((3, 3))
    _, state = tx.update(params.at[1, 2].set(1e30), tx.init(params), params)
    assert rmsprop_jax.nonfinite_entries(tx, state, params).all()


def pytorch(g: np.ndarray, centered: bool, momentum: float) -> np.ndarray:
    """The updates of `torch.optim.RMSprop(lr=0.1, alpha=0.9)` in float32, from its equations."""
    square, mean, buffer = np.zeros((3, *g.shape[1:]), np.float32)
    alpha, rest, found = np.float32(0.9), np.float32(0.1), []
    with np.errstate(over='ignore', invalid='ignore'):
        for x in g:
            square = alpha * square + rest * x * x
            mean = mean + rest * (x - mean)
            root = np.sqrt(square - mean * mean if centered else square) + np.float32(1e-8)
            buffer = np.float32(momentum) * buffer + x / root
            found.append(np.float32(-0.1) * buffer)
    return np.stack(found)


def ours(g: np.ndarray, centered: bool, momentum: float) -> np.ndarray:
    return run(rmsprop_jax.rmsprop(0.1, centered=centered, momentum=momentum), g)[0]


def theirs(g: np.ndarray, centered: bool, momentum: float) -> np.ndarray:
    return run(optax.rmsprop(0.1, centered=centered, momentum=momentum), g)[0]


@pytest.mark.parametrize('rule', [ours, theirs, pytorch], ids=['ours', 'Optax', 'PyTorch'])
@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize('centered', [False, True])
def test_every_form_of_every_peer_freezes(rule, centered: bool, momentum: float):
    """No later gradient moves the coordinate; with momentum it coasts. Where the squared mean is
    infinite as well, the centered form of the others may turn NaN: infinity less infinity, unless a
    compiler contracts product and difference."""
    g = np.random.default_rng(24).uniform(1, 2, (STEPS, 3)).astype(np.float32)
    g[1::2] *= -1
    g[3, :2] = 1e20, 1e30
    updates = np.array(rule(g, centered, momentum))
    if centered and rule is not ours and np.isnan(updates[3, 1]):
        assert np.all(np.isnan(updates[3:, 1]))
        updates[3:, 1] = 0
    np.testing.assert_allclose(updates[4:, :2], momentum * updates[3:-1, :2], rtol=1e-6)
    # Another coordinate moves on.
    assert np.all(np.abs(updates[4:, 2] - momentum * updates[3:-1, 2]) > 0.01)


def test_a_factored_moment_is_mended_as_a_whole():
    tx = rmsprop_jax.rmsprop(0.1, storage=MEANS)
    params = {'a': jnp.zeros(SHAPE), 'b': jnp.zeros(SHAPE)}
    g = {'a': _overflows((1, 2), gradients(14)), 'b': gradients(15)}
    _, state = run(tx, jax.tree.map(lambda x: x[:10], g))
    entries = rmsprop_jax.nonfinite_entries(tx, state, params, MEANS)
    with pytest.raises(ValueError, match='only be selected as a whole'):
        rmsprop_jax.reset(tx, state, params, entries)
    leaves = jax.tree.map(jnp.any, entries)
    assert jax.tree.map(bool, leaves) == {'a': True, 'b': False}
    mended = rmsprop_jax.reset(tx, state, params, leaves)
    updates, _ = run(tx, jax.tree.map(lambda x: x[10:], g), mended)
    expected, _ = run(tx, {'a': g['a'][10:]})
    assert_alike(updates['a'], expected['a'])


@pytest.mark.extended
@pytest.mark.parametrize('centered', [False, True])
def test_bytes_recover_from_an_overflow_by_themselves(centered: bool):
    """When the average has forgotten it: in the mean over entries that were rounded at random."""
    kept = storage.per_statistic(**{'var' if centered else 'nu': BYTES})
    tx = rmsprop_jax.scale_by_rms(0.5, centered=centered, storage=kept)
    g = np.tile(np.array([[1.0], [-1.0]], np.float32), (100, 400))
    clean = np.abs(run(tx, g)[0][-1]).mean()
    g[0] = 1e30
    updates, state = run(tx, g)
    assert not rmsprop_jax.nonfinite_entries(tx, state, g[0], kept).any()
    np.testing.assert_allclose(np.abs(updates[-1]).mean(), clean, rtol=0.02)


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
    with pytest.raises(ValueError, match='only be selected as a whole'):
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


@pytest.mark.extended
def test_the_derivative_through_a_skipped_coordinate_is_finite():
    tx = rmsprop_jax.skip_nonfinite(rmsprop_jax.rmsprop(0.1))
    bad = jnp.array([1.0, jnp.nan])
    state = tx.init(bad)
    slope = jax.grad(lambda g: tx.update(g, state)[0].sum())(bad)
    assert np.isfinite(slope[0])
    assert slope[1] == 0
