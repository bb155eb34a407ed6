"""Storage formats: what they keep, what a run with them does, and what they refuse."""

import functools
import json
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import dialects, interchange, storage
from rmsprop_jax.dialects._record import functions
from rmsprop_jax.storage._choice import format_of, is_plain
from rmsprop_jax.storage._formats import FactorsOfPairs, as_factors, possible_kinds, stored_shape
from rmsprop_jax.storage._rounding import leaf_key, next_unit, random_bits, salt

everywhere = functools.partial(storage.large_leaves, min_size=1, min_ndim=0)
ROUNDING = [
    storage.bfloat16(),
    storage.uint8(),
    storage.uint8(scale=2.0**-20, seed=7),
]
FORMATS = [storage.float32(), *ROUNDING, storage.factored()]
each_rounding = pytest.mark.parametrize('kept', ROUNDING, ids=repr)
each_format = pytest.mark.parametrize('kept', FORMATS, ids=repr)


def numbers(low: float, high: float, shape=(200, 500)) -> jax.Array:
    """Positive numbers over all magnitudes between two powers of ten."""
    exponents = np.random.default_rng(0).uniform(low, high, shape)
    return jnp.asarray(10.0**exponents, jnp.float32)


def bits(kept, shape, count=0) -> jax.Array:
    return kept.bits(kept.key("nu['w']"), count, shape)


def inside(kept) -> jax.Array:
    low, high = np.log10(kept.smallest), np.log10(kept.largest)
    return jnp.clip(numbers(low, high), kept.smallest, kept.largest)


# Encoders


@pytest.mark.extended
@each_rounding
def test_every_platform_rounds_alike(kept, monkeypatch):
    """What TPU and GPU compile, run here, beside what a CPU runs; beyond the ends too."""
    odd = jnp.array([0.0, jnp.inf, jnp.nan, 3.4e38, 1e-37])
    x = jnp.concatenate([numbers(-37, 38).ravel(), jnp.tile(odd, 20)])
    x = jnp.concatenate([x, -x]) if kept.name == 'bfloat16' else x
    here = kept.encode(x, bits(kept, x.shape))
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, cpu, default: default(*args))
    there = kept.encode(x, bits(kept, x.shape))
    assert np.asarray(here).tobytes() == np.asarray(there).tobytes()


@pytest.mark.extended
@each_rounding
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(kept):
    x = inside(kept)
    draws = jnp.stack([kept.decode(kept.encode(x, bits(kept, x.shape, t))) for t in range(64)])
    low, high = draws.min(0), draws.max(0)
    assert jnp.all((low <= x) & (x <= high) | (low == high))
    # Nothing lies between the two numbers that an entry is rounded to.
    between = kept.decode(kept.encode(low / 2 + high / 2, bits(kept, x.shape, 99)))
    assert jnp.all((between == low) | (between == high))
    # The mean is that of a biased coin: within five standard errors of zero error.
    relative = (draws - x) / x
    error = relative.mean()
    assert abs(error) < 5 * relative.std() / np.sqrt(relative.size)
    gap = {'bfloat16': 2**-7, 'uint8': 0.5 ** getattr(kept, 'mantissa_bits', 0)}[kept.name]
    assert abs(relative).max() < gap


@each_rounding
def test_what_is_on_the_grid_stays(kept):
    if kept.name == 'uint8':
        codes = jnp.arange(256, dtype=jnp.uint8)
    else:
        codes = jax.lax.bitcast_convert_type(
            jnp.arange(2**7 * 9, 2**7 * 255, dtype=jnp.uint16), jnp.bfloat16
        )
    values = kept.decode(codes)
    for noise in (None, bits(kept, codes.shape), jnp.full(codes.shape, 2**32 - 1, jnp.uint32)):
        chex.assert_trees_all_equal(kept.encode(values, noise), codes)
    assert jnp.all(jnp.diff(values) > 0)
    assert values[-1] == kept.largest


@each_rounding
def test_a_unit_stretches_the_grid(kept):
    values = inside(kept)[0]
    noise = bits(kept, values.shape)
    stored = kept.encode(values, noise, jnp.float32(4))
    chex.assert_trees_all_equal(stored, kept.encode(values / 4, noise))
    chex.assert_trees_all_equal(kept.decode(stored, jnp.float32(1.5)), 1.5 * kept.decode(stored))


@each_rounding
def test_ends(kept):
    def kept_as(x):
        return float(kept.decode(kept.encode(jnp.float32(x), jnp.uint32(2**32 - 1))))

    assert kept_as(0.0) == 0.0
    assert kept_as(kept.smallest / 2) == kept.smallest
    assert kept_as(3.4e38) == kept.largest
    assert kept_as(jnp.inf) == (kept.largest if kept.name == 'uint8' else jnp.inf)
    top_for_nan = kept_as(jnp.nan)
    assert top_for_nan == kept.largest if kept.name == 'uint8' else np.isnan(top_for_nan)


def test_bfloat16_keeps_signs():
    x = numbers(-30, 30)
    kept = storage.bfloat16()
    noise = bits(kept, x.shape)
    chex.assert_trees_all_equal(kept.encode(-x, noise), -kept.encode(x, noise))


def test_factored_is_exact_for_products():
    """A rank-one matrix, batch by batch, with rows of zeros."""
    row, col = numbers(-3, 3, (3, 5)), numbers(-3, 3, (3, 7)).at[0].set(0)
    nu = row[:, :, None] * col[:, None, :]
    stored = storage.factored().encode(nu)
    assert (stored.row.shape, stored.col.shape) == ((3, 5), (3, 7))
    chex.assert_trees_all_close(storage.factored().decode(stored), nu, rtol=1e-5)


def test_factored_is_exact_for_the_smallest_normal_number_and_zero_below():
    tiny = float(jnp.finfo(jnp.float32).tiny)
    at, below = jnp.full((4, 4), tiny), jnp.zeros((4, 16)).at[0, 0].set(8 * tiny)
    for nu, expected in ((at, at), (below, 0 * below)):
        stored = storage.factored().encode(nu)
        chex.assert_trees_all_equal(storage.factored().decode(stored), expected)


@pytest.mark.parametrize('make', [rmsprop_jax.rmsprop, dialects.torch])
def test_factors_in_a_mapping_stay_in_one(make):
    """As Flax NNX holds them; PyTorch's factors are those of pairs."""
    tx = make(0.1, storage=everywhere(storage.factored()))
    g = numbers(-1, 1, (3, 4)) + (1j if make is dialects.torch else 0)
    _, state = tx.update(g, tx.init(g), g)
    held = (state[0]._replace(nu=state[0].nu._asdict()), *state[1:])
    updates, after = tx.update(g, state, g)
    same_updates, held_after = tx.update(g, held, g)
    assert type(held_after[0].nu) is dict
    chex.assert_trees_all_equal(same_updates, updates)
    chex.assert_trees_all_equal(held_after[0].nu, after[0].nu._asdict())


@pytest.mark.parametrize(
    ('row', 'col', 'kind', 'shape'),
    [
        ((3, 2), (4, 2), FactorsOfPairs, (3, 4, 2)),
        ((5, 3, 2), (5, 4, 2), FactorsOfPairs, (5, 3, 4, 2)),
        ((3, 4), (3, 2), storage.Factors, (3, 4, 2)),
        ((5, 3, 4), (5, 3, 2), storage.Factors, (5, 3, 4, 2)),
    ],
)
def test_shapes_tell_stored_factors_of_pairs_from_those_of_older_releases(row, col, kind, shape):
    """Which were means over the last two axes, the pair among them."""
    stored = FactorsOfPairs(row=np.zeros(row), col=np.zeros(col))
    for x in (stored, stored._asdict()):
        found = as_factors(x, FactorsOfPairs)
        assert type(found) is kind
        assert (found.row is stored.row, found.col is stored.col) == (True, True)
    assert stored_shape(stored) == shape


@pytest.mark.parametrize(
    ('row', 'col', 'kinds'),
    [
        ((3, 2), (4, 2), [FactorsOfPairs]),
        ((5, 3, 2), (5, 4, 2), [FactorsOfPairs]),
        ((3,), (4,), [storage.Factors]),
        ((2,), (2,), [storage.Factors]),  # Pairs have an axis more.
        ((3, 4), (3, 2), [storage.Factors]),
        ((3, 2), (3, 2), [storage.Factors, FactorsOfPairs]),
        ((3, 2), (4, 5), []),
        ((), (), []),
    ],
)
def test_shapes_tell_what_a_mapping_holds(row, col, kinds):
    stored = storage.Factors(row=np.zeros(row), col=np.zeros(col))
    assert possible_kinds(stored) == kinds
    assert type(as_factors(stored._asdict())) is [*kinds, storage.Factors][0]


@pytest.mark.parametrize('stored', [{'row': 1, 'col': 2, 'more': 3}, {'row': 1}, np.ones(3), None])
def test_what_is_not_stored_as_factors_stays(stored):
    assert as_factors(stored) is stored
    assert stored_shape(stored) == getattr(stored, 'shape', None)


@pytest.mark.parametrize('fill', [0, 0.3])
@each_format
def test_a_traced_number_is_stored_like_a_python_number(kept, fill):
    make = functools.partial(kept.init, jnp.zeros((2, 3)), dtype=jnp.float32)
    chex.assert_trees_all_equal(make(fill), kept.encode(jnp.full((2, 3), jnp.float32(fill))))
    chex.assert_trees_all_equal(jax.jit(make)(jnp.float32(fill)), make(fill))


@each_rounding
def test_numbers_on_the_grid_are_float32_beside_float64(kept):
    x = np.float32([1e-3, 1, 3])
    stored = kept.encode(x)
    with jax.enable_x64(True):
        chex.assert_trees_all_equal(kept.encode(np.float64(x)), stored)
        assert kept.decode(stored).dtype == jnp.float32


@pytest.mark.parametrize(
    ('unit', 'decay', 'expected'),
    [(1.5, 0.5, 1.5), (1.0, 0.75, 1.5), (1.25, 0.9, 1.125), (1.0, 0.5, 1.0), (1.5, 0.0, 1.0)],
)
def test_the_unit_of_the_grid_decays_within_its_octave(unit, decay, expected):
    found = next_unit(jnp.float32(unit), jnp.float32(decay))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@each_rounding
def test_only_the_tpu_platform_takes_a_root_as_it_is(kept):
    """Elsewhere the compiler must not fuse it with the division after it: see `kept_apart`."""

    def program(platform):
        step = jax.jit(kept.arithmetic.keep)
        return jax.export.export(step, platforms=[platform])(jnp.ones(3)).mlir_module()

    assert ['maximum' in program(name) for name in ('cpu', 'cuda', 'tpu')] == [True, True, False]


def test_random_bits_look_random():
    """Uniform, and uncorrelated between neighbours, steps, leaves, statistics and seeds."""
    shape = (512, 512)

    def uniform(seed, label, count):
        drawn = random_bits(shape, salt(leaf_key(seed, label), count))
        return np.asarray(drawn, np.float64) / 2**32 - 0.5

    one = uniform(0, "nu['w']", 1)
    error = 1 / np.sqrt(one.size)
    assert abs(one.mean()) < 4 * error * np.sqrt(1 / 12)
    assert abs(one.var() * 12 - 1) < 4 * error * np.sqrt(4 / 5)
    others = [
        uniform(0, "nu['w']", 2),
        uniform(1, "nu['w']", 1),
        uniform(0, "nu['v']", 1),
        uniform(0, "trace['w']", 1),
        np.roll(one, 1, 0),
        np.roll(one, 1, 1),
    ]
    for other in others:
        assert abs((one * other).mean() * 12) < 4 * error


def test_random_bits_are_those_of_the_hash():
    """Checkpoints go on with the same bits; here they come from integers without a width."""

    def lowbias32(x):
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    kept, shape, count = storage.uint8(seed=7), (2, 3, 5), 10**9
    key = zlib.crc32(b"7 nu['w']")
    assert kept.key("nu['w']") == key
    of_step = lowbias32((count * 0x9E3779B9 + key) % 2**32)
    expected = [lowbias32(index ^ of_step) for index in range(30)]
    found = np.asarray(kept.bits(key, jnp.int32(count), shape))
    assert found.ravel().tolist() == expected
    assert storage.float32().bits(storage.float32().key("nu['w']"), count, shape) is None


@pytest.mark.parametrize('spec', [P('x', 'y'), P(('y', 'x')), P(None, None, 'x')])
def test_random_bits_of_shares_are_those_of_the_whole(spec):
    kept, mesh = storage.bfloat16(), jax.make_mesh((4, 2), ('x', 'y'))
    whole = bits(kept, (8, 8, 8))
    split = jax.shard_map(
        lambda share: kept.bits(kept.key("nu['w']"), 0, share.shape, spec),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    placed = jax.device_put(whole, NamedSharding(mesh, spec))
    chex.assert_trees_all_equal(jax.jit(split)(placed), whole)


def test_random_bits_of_more_entries_than_integers():
    found = jax.eval_shape(functools.partial(random_bits, (2, 2**16, 2**16)), jnp.uint32(1))
    assert found.dtype == jnp.uint32


# Runs


def averages(tx, kept, gradients, params):
    """The decoded `nu` after a scan over gradients."""

    def step(state, g):
        return tx.update(g, state)[1], None

    state = jax.jit(lambda gs: jax.lax.scan(step, tx.init(params), gs)[0])(gradients)
    return optax.tree.get(storage.read(state, everywhere(kept)), 'nu')


@pytest.mark.extended
@each_rounding
@pytest.mark.parametrize('decay', [0.9, 0.99, 0.999])
def test_the_average_neither_stalls_nor_drifts(kept, decay):
    """A constant gradient: nu = g^2 (1 - decay^t), on average over entries that are alike."""
    size, count = kept.scale**0.5 if kept.name == 'uint8' else 1.0, 3000
    tx = rmsprop_jax.scale_by_rms(decay, storage=everywhere(kept))
    gradients = jnp.broadcast_to(jnp.float32(size), (count, 128, 128))
    error = averages(tx, kept, gradients, gradients[0]) / size**2 / (1 - decay**count) - 1
    certainty = float(error.std()) / 128
    assert certainty < {'bfloat16': 5e-4, 'uint8': 5e-3}[kept.name]
    assert abs(float(error.mean())) < 4 * certainty
    # Optax with a bfloat16 accumulator stalls, which is why this is not the same as a cast.
    if decay == 0.999 and kept.name == 'bfloat16':
        theirs = optax.scale_by_rms(decay)
        stalled = theirs.init(jnp.zeros((), jnp.bfloat16))
        for _ in range(700):
            _, stalled = theirs.update(jnp.ones((), jnp.bfloat16), stalled)
        last = theirs.update(jnp.ones((), jnp.bfloat16), stalled)[1]
        assert last.nu == stalled.nu < 0.55


@each_rounding
def test_a_silent_entry_is_not_rounded(kept):
    """After one gradient and many zeros nu is decay^t of what it was, through all its octaves."""
    size = kept.scale**0.5 if kept.name == 'uint8' else 1.0
    g = size * jnp.linspace(0.5, 2, 8)
    gradients = jnp.zeros((1500, 8)).at[0].set(g)
    tx = rmsprop_jax.scale_by_rms(0.99, storage=everywhere(kept))
    start = averages(tx, kept, gradients[:1], jnp.zeros(8))
    end = averages(tx, kept, gradients, jnp.zeros(8))
    np.testing.assert_allclose(end, start * 0.99**1499, rtol=2e-4)


@pytest.mark.extended
@each_format
@pytest.mark.parametrize('decay', [0.5, 0.99])
def test_no_step_exceeds_the_bound_of_the_exact_one(kept, decay):
    """|u| <= 1 / sqrt(1 - decay), beyond the ends of every window and after sudden jumps."""
    generator = np.random.default_rng(1)
    scale = 10.0 ** generator.uniform(-18, 18, (40, 16, 16))
    gradients = jnp.asarray(scale * generator.standard_normal(scale.shape), jnp.float32)
    where = storage.large_leaves(kept, min_size=1)
    tx = rmsprop_jax.scale_by_rms(decay, eps=0.0, storage=where)
    state = tx.init(gradients[0])
    for g in gradients:
        u, state = jax.jit(tx.update)(g, state)
        assert jnp.all(jnp.abs(u) <= (1 + 1e-5) / np.sqrt(1 - decay))
        assert jnp.all(jnp.isfinite(u))


@pytest.mark.extended
@each_rounding
def test_a_centered_step_divides_by_no_variance_that_the_format_made_small(kept):
    """Beside float32, over means and deviations that reach both ends of the window.

    The variance is a sum of squares whatever the mean is, so that a rounded mean only adds to it,
    and it is rounded to a positive number if it is positive. At the upper end the squared mean is
    added, which makes it at least (1 - decay) g^2.
    """
    generator = np.random.default_rng(2)
    deviation = 10.0 ** generator.uniform(-16, 9, (32, 32))
    mean = deviation * 10.0 ** generator.uniform(-2, 2, (32, 32))
    noise = generator.standard_normal((600, 32, 32))
    gradients = jnp.asarray(mean + deviation * noise, jnp.float32)
    choice = storage.per_statistic(var=everywhere(kept), mu=everywhere(storage.bfloat16()))

    def steps(where):
        tx = rmsprop_jax.scale_by_stddev(0.99, eps=0.0, storage=where)

        def step(state, g):
            u, after = tx.update(g, state)
            return after, (u, state.var)

        return jax.jit(lambda gs: jax.lax.scan(step, tx.init(gs[0]), gs)[1])(gradients)

    (exact, variance), (ours, stored) = steps(None), steps(choice)
    assert jnp.all(jnp.isfinite(ours))
    never = variance.max(0) < kept.largest / 2
    # Bytes that a power of two lies between are rounded up late once in a while: sixteen times too
    # small, in one of a million.
    worst = {'bfloat16': 1.1, 'uint8': 4.0}[kept.name]
    assert jnp.abs(ours / exact)[:, never].max() < worst
    if kept.name == 'uint8':
        saturated = stored == 255
        assert saturated.any()
        assert jnp.abs(ours[saturated]).max() < 1.00001 / np.sqrt(1 - 0.99)


def test_the_guard_at_the_upper_end_matters():
    """Without it a step at a saturated variance grows with the mean."""
    kept = storage.uint8(scale=2.0**-43)
    choice = storage.per_statistic(var=everywhere(kept))
    tx = rmsprop_jax.scale_by_stddev(0.9, eps=0.0, storage=choice)
    state, update = tx.init(jnp.zeros(())), jax.jit(tx.update)
    for sign in (1, -1) * 20:
        _, state = update(jnp.float32(1e6 + sign * 1e4), state)
    assert state.var == 255
    u, _ = update(jnp.float32(1e6 + 1e4), state)
    naive = 1e6 / np.sqrt(2 * kept.largest * 0.9 + 0.09 * 2e4**2)
    assert naive > 100
    assert abs(float(u)) < 1.2


@pytest.mark.extended
def test_state_does_not_depend_on_the_mesh():
    tx = rmsprop_jax.rmsprop(
        0.1, momentum=0.9, centered=True, storage=everywhere(storage.bfloat16())
    )
    params = {'a': jnp.zeros((16, 8)), 'b': jnp.zeros((8, 8))}
    grads = jax.tree.map(lambda p: numbers(-3, 3, p.shape), params)

    def run(params, grads):
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params)
        return state

    one = jax.jit(run)(params, grads)
    for shape, spec in (((8,), P('x')), ((4, 2), P('x', 'y')), ((2, 4), P('y', 'x'))):
        mesh = jax.make_mesh(shape, ('x', 'y')[: len(shape)])
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
        many = jax.jit(run)(jax.tree.map(place, params), jax.tree.map(place, grads))
        chex.assert_trees_all_equal(many, one)


def test_bits_come_from_paths_not_from_positions():
    """Masking and partitioning change which leaves a transformation sees, not what it stores."""
    make = functools.partial(rmsprop_jax.scale_by_rms, storage=everywhere(storage.uint8()))
    params = {'a': jnp.zeros((8, 8)), 'b': jnp.zeros((8, 8)), 'c': jnp.zeros((8, 8))}
    grads = jax.tree.map(lambda _: numbers(-3, 3, (8, 8)), params)
    tx = make()
    _, whole = tx.update(grads, tx.init(params))
    masked = optax.masked(make(), {'a': False, 'b': False, 'c': True})
    _, part = masked.update(grads, masked.init(params))
    chex.assert_trees_all_equal(part.inner_state.nu['c'], whole.nu['c'])
    split = optax.partition({'x': make(), 'y': make()}, {'a': 'x', 'b': 'y', 'c': 'y'})
    _, parts = split.update(grads, split.init(params))
    for label, name in (('x', 'a'), ('y', 'b'), ('y', 'c')):
        stored = parts.inner_states[label].inner_state.nu[name]
        chex.assert_trees_all_equal(stored, whole.nu[name])
    assert not jnp.all(whole.nu['a'] == whole.nu['b'])


@pytest.mark.extended
@pytest.mark.parametrize('where', [storage.bfloat16(), storage.factored()], ids=repr)
def test_derivative_through_training(where):
    """Straight through the rounding: that of float32, but for what rounding did to the values."""
    params = numbers(-1, 1, (64, 64))

    def loss(rate, where):
        tx = rmsprop_jax.rmsprop(rate, 0.9, storage=where)
        x, state = params, tx.init(params)
        for _ in range(5):
            u, state = tx.update(jnp.cos(x), state, x)
            x = x + u
        return jnp.sum(jnp.sin(x))

    exact = jax.grad(loss)(0.01, None)
    tolerance = {'bfloat16': 2e-3, 'factored': 0.3}[where.name]
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss), static_argnums=1)(0.01, where), exact, rtol=tolerance
    )
    if where.name == 'factored':
        h = 1e-3
        numerical = (loss(0.01 + h, where) - loss(0.01 - h, where)) / (2 * h)
        np.testing.assert_allclose(jax.grad(loss)(0.01, where), numerical, rtol=2e-2)


@pytest.mark.extended
def test_bytes_have_no_derivative():
    tx = rmsprop_jax.rmsprop(0.1, storage=everywhere(storage.uint8()))

    def final(x):
        u, state = tx.update(x, tx.init(x))
        return tx.update(u, state)[0].sum()

    x = jnp.ones((4, 4))
    final(x)
    for differentiate in (jax.grad(final), jax.jit(jax.grad(final))):
        with pytest.raises(TypeError) as error:
            differentiate(x)
        assert str(error.value) == (
            'storage.uint8 cannot be differentiated through: a byte has no derivative. Use '
            'storage.float32() or storage.bfloat16() to differentiate through training.'
        )


# Choices


def test_small_leaves_stay_float32_by_a_rule_that_can_be_changed():
    params = {'kernel': jnp.zeros((64, 64)), 'small': jnp.zeros((63, 65)), 'b': jnp.zeros(10000)}
    kept = storage.bfloat16()

    def dtypes(where):
        nu = rmsprop_jax.scale_by_rms(storage=where).init(params).nu
        return {name: str(leaf.dtype) for name, leaf in nu.items()}

    default = {'kernel': 'bfloat16', 'small': 'float32', 'b': 'float32'}
    assert dtypes(kept) == default == dtypes(storage.large_leaves(kept))
    assert dtypes(everywhere(kept)) == dict.fromkeys(params, 'bfloat16')
    chosen = storage.per_leaf(lambda path, _: kept if path == "['small']" else storage.float32())
    assert dtypes(chosen) == {'kernel': 'float32', 'small': 'bfloat16', 'b': 'float32'}
    assert dtypes(storage.per_statistic(nu=kept)) == default
    assert dtypes(storage.per_statistic(trace=kept)) == dict.fromkeys(params, 'float32')
    wide = storage.per_leaf(lambda _, shape: kept if shape[0] < 64 else storage.float32())
    assert dtypes(wide) == {'kernel': 'float32', 'small': 'bfloat16', 'b': 'float32'}
    assert storage.large_leaves(kept, min_size=0, min_ndim=0).choose('', ()) == kept


def test_each_named_statistic_has_its_own_format():
    formats = [storage.bfloat16(seed=seed) for seed in range(4)]
    choice = storage.per_statistic(**dict(zip(('nu', 'mu', 'var', 'trace'), formats, strict=True)))
    assert [choice.nu, choice.mu, choice.var, choice.trace] == formats


def test_choices_without_functions_are_plain():
    by_leaf = storage.per_leaf(lambda path, shape: storage.float32())
    plain = [None, True, 1, 0.5, 'uint8', np.float32(1), *FORMATS, MIXED, everywhere(FORMATS[0])]
    others = [by_leaf, *(storage.per_statistic(**{name: by_leaf}) for name in ('nu', 'trace')), len]
    assert [x for x in (*plain, *others) if is_plain(x)] == plain


@pytest.mark.parametrize('name', functions())
def test_every_dialect_takes_storage(name):
    tx = functions()[name](0.1, storage=storage.bfloat16())
    params = {'w': jnp.ones((64, 64)), 'b': jnp.ones(64)}
    state = tx.init(params)
    _, after = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    found = [leaf.dtype for leaf in jax.tree.leaves(after) if leaf.shape == (64, 64)]
    assert found
    assert set(found) == {jnp.dtype('bfloat16')}


A_CHOICE = 'must be a format or a choice from rmsprop_jax.storage'
NO_SIGN = (
    'it has no sign. Give storage.per_statistic(nu=storage.uint8(), var=storage.uint8()), and '
    'bfloat16 or float32 for the others.'
)
ONLY_NU = (
    'means over rows and columns keep neither a sign nor a small difference. Give '
    'storage.per_statistic(nu=storage.factored()), and bfloat16 or float32 for the others.'
)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: rmsprop_jax.scale_by_rms(storage=storage.bfloat16),
            f'storage {A_CHOICE}, got {storage.bfloat16}. Call it: storage.bfloat16().',
        ),
        (
            lambda: rmsprop_jax.scale_by_rms(storage=len),
            f'storage {A_CHOICE}, got {len}. Wrap a function in storage.per_leaf.',
        ),
        (
            lambda: rmsprop_jax.scale_by_rms(storage='uint8'),
            f"storage {A_CHOICE}, got 'uint8'.",
        ),
        (lambda: storage.per_statistic(mu='uint8'), f"mu {A_CHOICE}, got 'uint8'."),
        (lambda: storage.large_leaves('uint8'), "format must be a storage format, got 'uint8'."),
        (
            lambda: storage.per_leaf(3),
            'storage.per_leaf needs a function of path and shape, got 3.',
        ),
        (
            lambda: storage.uint8(scale=jnp.float32(1)),
            'scale must be a Python number: it decides how bytes are read.',
        ),
        (lambda: storage.uint8(scale=lambda count: 1.0), 'scale cannot be a schedule.'),
        (lambda: storage.bfloat16(seed=1.5), 'seed must be a Python integer, got 1.5.'),
        (lambda: storage.uint8(seed=True), 'seed must be a Python integer, got True.'),
        (lambda: storage.uint8().encode({}), 'x is a dict, not an array.'),
    ],
)
def test_wrong_types_are_refused(make, message):
    with pytest.raises(TypeError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: rmsprop_jax.rmsprop(0.1, momentum=0.9, storage=storage.uint8()),
            f'storage.uint8 cannot hold trace: {NO_SIGN}',
        ),
        (
            lambda: rmsprop_jax.scale_by_stddev(storage=storage.uint8()),
            f'storage.uint8 cannot hold mu: {NO_SIGN}',
        ),
        (
            lambda: rmsprop_jax.scale_by_stddev(storage=storage.factored()),
            f'storage.factored cannot hold var: {ONLY_NU}',
        ),
        (
            lambda: rmsprop_jax.trace(0.9, storage=storage.factored()),
            f'storage.factored cannot hold trace: {ONLY_NU}',
        ),
        (
            lambda: storage.per_statistic(mu=storage.factored()),
            f'storage.factored cannot hold mu: {ONLY_NU}',
        ),
        (
            lambda: storage.large_leaves(storage.uint8(), min_size=-1),
            'min_size must be an integer of at least 0, got -1.',
        ),
        (
            lambda: storage.large_leaves(storage.uint8(), min_ndim=-1),
            'min_ndim must be an integer of at least 0, got -1.',
        ),
        (lambda: storage.uint8(scale=-1.0), 'scale must be in [0, inf), got -1.0.'),
        *(
            (
                functools.partial(storage.uint8, scale=scale),
                f'scale must be a power of two in [2^-46, 2^60], got {scale}.',
            )
            for scale in (0.0, 3.0, 2.0**-47, 2.0**61)
        ),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value) == message


@pytest.mark.parametrize('scale', [2.0**-46, 2.0**60])
def test_bytes_at_the_ends_of_the_scale(scale):
    kept = storage.uint8(scale=scale)
    assert (kept.smallest, kept.largest) == (scale * 2.0**-80, scale * 2.0**54)
    stored = jnp.uint8([1, 255])
    values = kept.decode(stored)
    assert values.tolist() == [kept.smallest, kept.largest]
    chex.assert_trees_all_equal(kept.encode(values), stored)


@pytest.mark.parametrize(
    ('kept', 'stored', 'fault'),
    [
        (storage.float32(), 'a', 'has str'),
        (storage.bfloat16(), None, 'has NoneType'),
        *(
            (kept, np.zeros(3, dtype), f'is stored as {dtype}, not in the format {name}')
            for kept, dtype, name in (
                (storage.float32(), 'uint8', 'storage.float32'),
                (storage.float32(), jnp.dtype(jnp.bfloat16), 'storage.float32'),
                (storage.bfloat16(), 'float32', 'storage.bfloat16'),
                (storage.uint8(), 'float32', 'storage.uint8'),
            )
        ),
        (storage.factored(), np.zeros(3), 'is not stored in the format storage.factored'),
        (
            storage.factored(),
            storage.Factors(row=np.zeros((2, 3)), col=np.zeros((5, 7))),
            'has factors of shapes (2, 3) and (5, 7)',
        ),
    ],
)
def test_stored_forms_of_others_are_refused(kept, stored, fault):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        kept.decode(stored)
    assert str(error.value) == f'stored {fault}.'


@each_format
def test_stored_forms_of_another_shape_are_refused(kept):
    stored = kept.init(jnp.zeros((2, 3)), 0, jnp.float32)
    shapes = 'factors of shapes (2,) and (3,)' if kept.name == 'factored' else '(2, 3)'
    assert kept.fault(stored, (2, 3)) is None
    assert kept.fault(stored, (3, 2)) == f'has {shapes}'


@pytest.mark.parametrize('spec', [P('x'), P('x', None), P(None, 'x'), P(None, ('x',))])
def test_means_over_split_axes_are_refused(spec):
    found = []

    def shared(x):
        make = functools.partial(format_of, everywhere(storage.factored()), 'nu', "['w']")
        # Earlier axes are a batch.
        assert make((8, 8, 8), False, P('x', None, None)) == storage.factored()
        try:
            make((8, 8), False, spec)
        except ValueError as error:
            found.append(str(error))
        return x

    mesh = jax.make_mesh((8,), ('x',))
    jax.eval_shape(jax.shard_map(shared, mesh=mesh, in_specs=P(), out_specs=P()), jnp.ones(8))
    assert found == [
        f"params['w']: storage.factored takes means over axes that {spec} splits under "
        'jax.shard_map. Update it outside of shard_map, where the compiler takes means over all '
        'devices.'
    ]


@pytest.mark.parametrize(
    ('tx', 'params', 'message'),
    [
        (
            rmsprop_jax.scale_by_rms(storage=everywhere(storage.factored())),
            {'dense': {'bias': jnp.ones(3)}},
            r"params\['dense'\]\['bias'\]: storage.factored needs two axes",
        ),
        (
            rmsprop_jax.trace(0.9, storage=everywhere(storage.bfloat16())),
            {'w': jnp.ones(3, jnp.complex64)},
            r"params\['w'\]: storage.bfloat16 cannot hold trace: it is complex",
        ),
        (
            rmsprop_jax.scale_by_stddev(storage=everywhere(storage.bfloat16())),
            {'w': jnp.ones(3, jnp.complex64)},
            r"params\['w'\]: storage.bfloat16 cannot hold mu: it is complex",
        ),
        (
            rmsprop_jax.trace(0.9, storage=storage.per_leaf(lambda path, shape: storage.uint8())),
            {'w': jnp.ones(3)},
            r"params\['w'\]: storage.uint8 cannot hold trace",
        ),
        (
            dialects.tensorflow(0.1, sparse=True, storage=everywhere(storage.bfloat16())),
            {'w': jnp.ones(3)},
            r'rows can be held still only in float32',
        ),
    ],
)
def test_leaves_that_do_not_fit_are_named(tx, params, message):
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params)


def test_a_function_that_returns_no_format_is_named():
    tx = rmsprop_jax.scale_by_rms(storage=storage.per_leaf(lambda path, shape: 'uint8'))
    with pytest.raises(TypeError, match=r"params\['w'\] it returned 'uint8'"):
        tx.init({'w': jnp.ones(3)})


def test_a_state_in_another_format_is_refused():
    params = {'w': jnp.ones((64, 64))}
    plain, compact = rmsprop_jax.trace(0.9), rmsprop_jax.trace(0.9, storage=storage.bfloat16())
    for here, there in ((plain, compact), (compact, plain)):
        with pytest.raises(ValueError, match=r"updates\['w'\].*trace is stored as.*convert"):
            here.update(params, there.init(params))
    rounded = rmsprop_jax.scale_by_rms(storage=storage.uint8())
    with pytest.raises(ValueError, match=r'another storage: storage\.convert'):
        rmsprop_jax.scale_by_rms().update(params, rounded.init(params))
    factored = rmsprop_jax.scale_by_rms(storage=storage.factored())
    with pytest.raises(ValueError, match=r"updates\['w'\].*nu is not stored.*convert"):
        factored.update(params, rmsprop_jax.scale_by_rms().init(params))


# Outside of a step

PARAMS = {'w': jnp.ones((64, 64)), 'b': jnp.ones(3)}
MIXED = storage.per_statistic(nu=storage.uint8(), trace=storage.bfloat16())


def wrapped(where):
    """Our optimizer inside several of Optax's wrappers."""
    inner = rmsprop_jax.rmsprop(0.1, momentum=0.9, initial_scale=1.0, storage=where)
    split = optax.partition({'x': inner, 'y': optax.sgd(0.1)}, {'w': 'x', 'b': 'y'})
    return optax.chain(optax.clip_by_global_norm(1.0), optax.apply_if_finite(split, 3))


def trained(tx, steps=5):
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(3 * p + i) * numbers(-2, 0, p.shape), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return state


@pytest.mark.extended
@pytest.mark.parametrize(
    'to',
    [MIXED, storage.bfloat16(), storage.per_statistic(nu=storage.factored())],
    ids=['mixed', 'bfloat16', 'factored'],
)
def test_convert_goes_on_in_another_format(to):
    before = trained(wrapped(None))
    after = storage.convert(before, PARAMS, None, to)
    tx = wrapped(to)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, tx.init(PARAMS))
    jax.jit(tx.update)(PARAMS, after, PARAMS)
    back = storage.convert(after, PARAMS, to, storage.float32())
    chex.assert_trees_all_equal_shapes_and_dtypes(back, before)
    chex.assert_trees_all_equal(back, storage.read(after, to))
    if to.__class__ is storage.bfloat16:
        chex.assert_trees_all_close(back, before, rtol=2**-8)
    # Between two formats that round, numbers stay multiples of the unit they had.
    compact = trained(wrapped(MIXED))
    wider = storage.convert(compact, PARAMS, MIXED, storage.bfloat16())
    chex.assert_trees_all_close(
        storage.read(wider, storage.bfloat16()), storage.read(compact, MIXED), rtol=2**-8
    )


def test_convert_names_what_does_not_fit():
    state = rmsprop_jax.rmsprop(0.1, momentum=0.9).init(PARAMS)
    with pytest.raises(ValueError, match=r"params\['w'\] does not exist"):
        storage.convert(state, {'b': PARAMS['b']}, None, MIXED)
    with pytest.raises(ValueError, match=r"state\[0\]\.nu\['w'\] is stored as float32"):
        storage.convert(state, PARAMS, MIXED, None)
    every = storage.per_leaf(lambda path, shape: storage.uint8())
    with pytest.raises(ValueError, match=r"params\['b'\]: storage.uint8 cannot hold trace"):
        storage.convert(state, PARAMS, None, every)


@pytest.mark.parametrize(
    ('kept', 'description'),
    [
        (storage.float32(), {'format': 'float32'}),
        (storage.bfloat16(seed=3), {'format': 'bfloat16', 'seed': 3, 'version': 1}),
        (
            storage.uint8(scale=np.float32(0.5)),
            {'format': 'uint8', 'seed': 0, 'scale': 0.5, 'version': 1},
        ),
        (storage.factored(), {'format': 'factored', 'version': 1}),
        (storage.factored().of_pairs(), {'format': 'factored', 'version': 1, 'of': 'pairs'}),
    ],
)
def test_description_is_what_older_checkpoints_hold(kept, description):
    assert json.loads(json.dumps(kept.description())) == description


def test_description_tells_formats_apart():
    tx = wrapped(MIXED)
    state = jax.eval_shape(tx.init, PARAMS)
    description = json.loads(json.dumps(storage.describe(state, MIXED)))
    storage.check(description, tx.init(PARAMS), MIXED)
    other = storage.per_statistic(nu=storage.uint8(seed=3), trace=storage.bfloat16())
    with pytest.raises(ValueError, match=r"nu\['w'\]: .*'seed': 0.* in the checkpoint.*'seed': 3"):
        storage.check(description, state, other)
    smaller = rmsprop_jax.scale_by_rms().init({'v': jnp.ones(2)})
    with pytest.raises(ValueError, match=r"nu\['v'\]: absent in the checkpoint"):
        storage.check(description, smaller, None)
    with pytest.raises(ValueError, match='was not made by storage.describe'):
        storage.check({'leaves': {}}, state, MIXED)
    later = {**description, 'rmsprop_jax': '9.9', 'rmsprop_jax.storage': 9}
    with pytest.raises(ValueError, match=r'rmsprop_jax 9\.9 with version 9 .* reads version 1'):
        storage.check(later, state, MIXED)


def test_a_checkpoint_of_an_older_release_is_refused_by_name_and_version():
    """Its states had the same formats, but another leaf."""
    state = rmsprop_jax.scale_by_rms().init(PARAMS)
    description = storage.describe(state, None)
    older = json.loads(json.dumps(description | {'rmsprop_jax': '0.0.9'}))
    older['leaves']['.steps'] = older['leaves'].pop('.count')
    with pytest.raises(ValueError, match='does not match the state') as refusal:
        storage.check(older, state, None)
    head, *lines = str(refusal.value).splitlines()
    release = rmsprop_jax.__version__
    assert f'rmsprop_jax 0.0.9 wrote it, and this is rmsprop_jax {release}; they' in head
    assert head.endswith('they differ in leaves.')
    assert [line.split(':')[0] for line in lines] == ['  .count', '  .steps']
    # What has not changed since loads.
    storage.check(description | {'rmsprop_jax': '0.0.9'}, state, None)


OTHER_SEED = storage.per_statistic(nu=storage.uint8(seed=3), trace=storage.bfloat16())
WITH_FACTORS = storage.per_statistic(nu=storage.factored(), trace=storage.bfloat16())


@pytest.mark.parametrize(
    ('tx', 'choice', 'difference'),
    [
        (wrapped(None), None, 'dtypes, formats'),
        (wrapped(OTHER_SEED), OTHER_SEED, 'formats'),
        (wrapped(WITH_FACTORS), WITH_FACTORS, 'formats'),
        (optax.adam(0.1), None, 'leaves, formats'),
    ],
    ids=['float32', 'another seed', 'factored', 'Adam'],
)
def test_a_checkpoint_of_this_release_is_refused_by_what_differs(tx, choice, difference):
    description = json.loads(json.dumps(storage.describe(wrapped(MIXED).init(PARAMS), MIXED)))
    with pytest.raises(ValueError, match='does not match the state') as refusal:
        storage.check(description, tx.init(PARAMS), choice)
    head = str(refusal.value).splitlines()[0]
    assert f'does not match the state: they differ in {difference}.' in head
    assert 'wrote it' not in head
    assert ('storage.convert' in head) == ('leaves' not in difference)


def test_the_way_that_a_refusal_names_is_passable():
    """Restored with the old storage, converted, and checked against the new one."""
    _, state = wrapped(MIXED).update(PARAMS, wrapped(MIXED).init(PARAMS))
    converted = storage.convert(state, PARAMS, MIXED, None)
    storage.check(storage.describe(converted, None), wrapped(None).init(PARAMS), None)


def test_saturation_counts_entries_at_the_ends():
    kept = storage.uint8()
    tx = optax.chain(rmsprop_jax.scale_by_rms(0.5, storage=everywhere(kept)))
    g = jnp.array([0.0, 1e-13, 1e-13, 1.0, 1e9])
    _, state = tx.update({'w': g}, tx.init({'w': g}))
    found = jax.jit(lambda state: storage.saturation(state, everywhere(kept)))(state)
    assert {k: [round(float(x), 3) for x in v] for k, v in found.items()} == {
        "[0].nu['w']": [0.4, 0.2]
    }
    assert storage.saturation(tx.init({'w': g})[0]._replace(unit=None, nu={'w': g}), None) == {}


@each_format
def test_bytes(kept):
    where = storage.large_leaves(kept, min_size=1)
    nu = rmsprop_jax.scale_by_rms(storage=where).init(jnp.zeros((40, 30, 20))).nu
    assert kept.nbytes((40, 30, 20)) == sum(x.nbytes for x in jax.tree.leaves(nu))


@each_format
def test_specs_are_those_of_the_stored_arrays(kept):
    spec = kept.spec(P('x', None, 'y'), 3)
    if kept.name == 'factored':
        assert spec == storage.Factors(row=P('x', None), col=P('x', 'y'))
        assert kept.spec(P('x'), 2) == storage.Factors(row=P('x'), col=P(None))
    else:
        assert spec == P('x', None, 'y')


@pytest.mark.extended
def test_reset_in_units_of_a_running_state():
    where = everywhere(storage.uint8())
    tx = rmsprop_jax.rmsprop(0.1, 0.9, initial_scale=1.0, storage=where)
    params = {'a': jnp.ones((4, 4)), 'b': jnp.ones((4, 4))}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state)
    mask = {'a': True, 'b': False}
    fresh = storage.read(rmsprop_jax.reset(tx, state, params, mask, where), where)
    # Bytes are at most a quarter apart, and this one is to the nearest.
    np.testing.assert_allclose(fresh[0].nu['a'], 1.0, rtol=0.125)
    chex.assert_trees_all_equal(fresh[0].nu['b'], storage.read(state, where)[0].nu['b'])
    with pytest.raises(ValueError, match='give the storage'):
        rmsprop_jax.reset(tx, state, params, mask)


def test_interchange_asks_for_decoded_states():
    tx = dialects.torch(0.1, storage=storage.bfloat16())
    pairs = [interchange.Pair('w', 'w'), interchange.Pair('b', 'b')]
    groups = [{'params': [0, 1], 'momentum': 0, 'centered': False}]
    with pytest.raises(interchange.InterchangeError, match='decode it with storage.read'):
        interchange.to_torch(tx.init(PARAMS), PARAMS, pairs, groups, names=['w', 'b'])


# Inside Flax


@pytest.mark.extended
def test_inside_nnx_optimizer():
    nnx = pytest.importorskip('flax.nnx')
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    tx = rmsprop_jax.rmsprop(1e-2, momentum=0.9, storage=MIXED)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (32, 64))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 2 * x) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(optimizer))}
    assert {'uint8', 'bfloat16', 'float32'} <= dtypes


def test_inside_train_state():
    train_state = pytest.importorskip('flax.training.train_state')
    tx = rmsprop_jax.rmsprop(1e-2, momentum=0.9, storage=MIXED)
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=state.params))
    after = step(step(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(after.opt_state, state.opt_state)
    assert after.opt_state[0].nu['w'].dtype == jnp.uint8
    assert float(after.params['w'].mean()) < 1
