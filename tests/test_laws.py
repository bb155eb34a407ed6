"""What holds for all gradients and hyperparameters, looked for with drawn ones.

Each law is tried on a few cases that are always the same, and on 2000 new ones by `make slow`.
Programs are compiled once for each structure; numbers are their arguments, so that a case costs
milliseconds.
"""

import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
from rmsprop_jax import dialects, interchange, storage

STEPS, ENTRIES = 4, 8
EPS32 = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)


def law(**drawn: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of a function of drawn arguments: a fixed few in the fast suite, many in the slow."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize('cases', [12, pytest.param(2000, marks=pytest.mark.slow)])
        def test(cases: int) -> None:
            how = hypothesis.settings(
                max_examples=cases,
                derandomize=cases == 12,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            how(hypothesis.given(**drawn)(check))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


class Form(NamedTuple):
    """What decides the program of a `rmsprop`, as opposed to its numbers."""

    centered: bool = False
    corrected: bool = False
    eps_in_sqrt: bool = True
    momentum: bool = False
    nesterov: bool = False
    leaves: str = 'one'
    dtype: str = 'float32'

    def build(self, numbers: Any) -> optax.GradientTransformation:
        return rmsprop_jax.rmsprop(
            numbers['rate'],
            numbers['decay'],
            numbers['eps'],
            numbers['start'],
            self.eps_in_sqrt,
            self.centered,
            numbers['momentum'] if self.momentum else None,
            self.nesterov,
            self.corrected,
        )

    def tree(self, x: Any) -> Any:
        """An array with a last axis of `ENTRIES` as a tree."""
        x = jnp.asarray(x, self.dtype)
        if self.leaves == 'one':
            return x
        if self.leaves == 'two':
            return {'a': x[..., :3], 'b': [x[..., 3:]]}
        return {'matrix': x[..., :6].reshape(*x.shape[:-1], 2, 3), 'scalar': (x[..., 6], x[..., 7])}


PLAIN = (
    Form(),
    Form(corrected=True, momentum=True, leaves='two'),
    Form(eps_in_sqrt=False, leaves='many'),
    Form(eps_in_sqrt=False, corrected=True, momentum=True, nesterov=True),
    Form(momentum=True, nesterov=True, leaves='two', dtype='bfloat16'),
    Form(corrected=True, dtype='float16'),
)
CENTERED = (
    Form(centered=True, leaves='many'),
    Form(centered=True, corrected=True, momentum=True),
    Form(centered=True, eps_in_sqrt=False, nesterov=True, momentum=True, leaves='two'),
    Form(centered=True, corrected=True, eps_in_sqrt=False, dtype='bfloat16'),
)
WIDE = tuple(form for form in PLAIN + CENTERED if form.dtype == 'float32')


class Drawn(NamedTuple):
    """A configuration, gradients of shape (STEPS, ENTRIES), and numbers."""

    form: Form
    g: np.ndarray
    numbers: dict[str, np.float32]


def gradients(low: int, high: int, shape: tuple[int, ...] = (STEPS, ENTRIES)) -> Any:
    """Arrays of zeros and of numbers of both signs from 2^low to 2^high, all magnitudes alike."""
    parts = 64
    most = (high - low) * parts
    size = int(np.prod(shape))

    def build(drawn: list[int]) -> np.ndarray:
        index = np.array(drawn)
        whole, part = np.divmod(np.abs(index) - 1, parts)
        x = np.sign(index) * np.ldexp(1 + part / parts, low + whole)
        return np.where(index == 0, 0, x).astype(np.float32).reshape(shape)

    one = st.integers(-most, most)
    return st.lists(one, min_size=size, max_size=size).map(build)


def real(low: float, high: float) -> st.SearchStrategy[np.float32]:
    return st.floats(np.float32(low).item(), np.float32(high).item(), width=32).map(np.float32)


decays = st.one_of(real(0.0, 0.9375), st.sampled_from([0.0, 0.9, 0.99, 0.999]).map(np.float32))


@st.composite
def cases(draw: st.DrawFn, forms: tuple[Form, ...]) -> Drawn:
    """Gradients from 1e-30 to 1e30; from 1e-15 to 1e15 where centered, whose start value then is of
    their size: without, a variance may be as small as the rounding of the mean makes it."""
    form = draw(st.sampled_from(forms))
    limit = 15 if form.dtype == 'float16' else 50 if form.centered else 100
    g = draw(gradients(-min(limit, 14) if limit == 15 else -limit, limit))
    scale = np.abs(g).max() ** 2 if form.centered else 1.0
    numbers = {
        'rate': draw(real(0.0, 8.0)),
        'decay': draw(real(0.5, 0.9375) if form.centered else decays),
        'eps': np.float32(draw(st.sampled_from([0.0, 1e-8, 1e-3, 2.0]))),
        'start': np.float32(scale * draw(real(0.125, 1.0) if form.centered else real(0, 1))),
        'momentum': draw(real(0.0, 0.9375)),
    }
    return Drawn(form, g, numbers)


def scanned(form: Form, numbers: Any, g: Any) -> tuple[Any, Any]:
    """Updates of all steps and the last state."""
    tx = form.build(numbers)

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        updates, state = tx.update(x, state)
        return state, updates

    first = jax.tree.map(lambda x: x[0], g)
    state, updates = jax.lax.scan(step, tx.init(first), g)
    return updates, state


@functools.cache
def program(form: Form) -> Callable[..., Any]:
    return jax.jit(functools.partial(scanned, form))


def run(drawn: Drawn) -> tuple[Any, Any]:
    return program(drawn.form)(drawn.numbers, drawn.form.tree(drawn.g))


@functools.cache
def single(form: Form) -> Callable[..., Any]:
    return jax.jit(lambda numbers, g, state: form.build(numbers).update(g, state))


def assert_close(got: Any, expected: Any, form: Form) -> None:
    """Equal but for how two programs contract products and sums, and the order they round in."""
    narrow = jnp.finfo(form.dtype).eps if form.dtype != 'float32' else 0
    tolerance = 64 * EPS32 + 2 * float(narrow)

    def leaf(x: Any, y: Any) -> None:
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        x, y = (np.where(np.isfinite(a), a, 0) for a in (x, y))
        # Sums of both signs are as right as their largest term.
        size = np.abs(y).max(initial=0) if form.momentum or form.centered else np.abs(y)
        allowed = tolerance * size + 4 * TINY
        assert (np.abs(x - y) <= allowed).all(), (x, y)

    jax.tree.map(leaf, got, expected)


# --- One program and another ---------------------------------------------------------------------


@law(drawn=cases(PLAIN + CENTERED))
def test_scan_equals_loop(drawn: Drawn) -> None:
    form, g, numbers = drawn
    updates, state = run(drawn)
    tree = form.tree(g)
    kept = form.build(numbers).init(jax.tree.map(lambda x: x[0], tree))
    for t in range(STEPS):
        update, kept = single(form)(numbers, jax.tree.map(lambda x, t=t: x[t], tree), kept)
        assert_close(jax.tree.map(lambda x, t=t: x[t], updates), update, form)
    assert_close(state, kept, form)


@law(drawn=cases(PLAIN[:2] + CENTERED[1:2]))
def test_jit_equals_no_jit(drawn: Drawn) -> None:
    form, g, numbers = drawn
    tree = form.tree(g)
    first = jax.tree.map(lambda x: x[0], tree)
    tx = form.build(jax.tree.map(jnp.asarray, numbers))
    state = tx.init(first)
    assert_close(tx.update(first, state), single(form)(numbers, first, state), form)


@functools.cache
def batched(form: Form) -> Callable[..., Any]:
    return jax.jit(jax.vmap(functools.partial(scanned, form)))


@law(drawn=st.sampled_from(PLAIN + CENTERED).flatmap(lambda form: st.tuples(*[cases((form,))] * 3)))
def test_vmap_equals_loop(drawn: tuple[Drawn, ...]) -> None:
    """Over gradients and all hyperparameters at once."""
    form = drawn[0].form
    numbers = jax.tree.map(lambda *x: np.stack(x), *[one.numbers for one in drawn])
    together = batched(form)(numbers, form.tree(np.stack([one.g for one in drawn])))
    for i, one in enumerate(drawn):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), run(one), form)


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((ENTRIES,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))


@law(drawn=cases(tuple(form for form in WIDE if form.leaves == 'one')))
def test_sharded_equals_whole(drawn: Drawn) -> None:
    form, g, numbers = drawn
    placed = jax.device_put(g, NamedSharding(mesh(), P(None, 'x')))
    updates, state = program(form)(numbers, placed)
    assert len(updates.sharding.device_set) == ENTRIES
    assert_close((updates, state), run(drawn), form)


@law(drawn=cases(tuple(form for form in WIDE if form.leaves == 'one')), random=st.randoms())
def test_order_does_not_matter(drawn: Drawn, random: Any) -> None:
    form, g, numbers = drawn
    order = np.array(random.sample(range(ENTRIES), ENTRIES))
    updates, _ = run(drawn)
    permuted, _ = program(form)(numbers, g[:, order])
    np.testing.assert_array_equal(permuted, updates[:, order])


@law(drawn=cases(tuple(form._replace(leaves='one') for form in PLAIN + CENTERED)))
def test_leaves_may_be_split(drawn: Drawn) -> None:
    """One step over two leaves is one over both as one leaf, with state in float32."""
    form, g, numbers = drawn
    whole, _ = run(drawn)
    for leaves in ('two', 'many'):
        parts, _ = run(Drawn(form._replace(leaves=leaves), g, numbers))
        flat = [np.asarray(x, np.float32).reshape(STEPS, -1) for x in jax.tree.leaves(parts)]
        assert_close(np.concatenate(flat, 1), np.asarray(whole, np.float32), form)


# --- The mathematics -----------------------------------------------------------------------------


@law(drawn=cases(tuple(form for form in WIDE if not form.centered)))
def test_updates_are_those_of_the_definition(drawn: Drawn) -> None:
    """Weighted means of all past squares, in extended precision; within what squares hold."""
    form, g, numbers = drawn
    g = np.where((np.abs(g) < 1e-15) | (np.abs(g) > 1e18), 0, g).astype(np.float32)
    n = {name: float(x) for name, x in numbers.items()}
    updates = np.concatenate(
        [np.reshape(x, (STEPS, -1)) for x in jax.tree.leaves(run(Drawn(form, g, numbers))[0])], 1
    )
    expected = reference.rmsprop_updates(
        g,
        n['rate'],
        n['momentum'] if form.momentum else None,
        form.nesterov,
        decays=n['decay'],
        eps=n['eps'],
        initial_scale=n['start'],
        eps_in_sqrt=form.eps_in_sqrt,
        bias_correction=form.corrected,
    ).astype(float)
    # A float32 decay has a complement that is right to its own rounding.
    tolerance = EPS32 * (8 + STEPS / (1 - n['decay']))
    size = np.abs(expected).max(0) if form.momentum else np.abs(expected)
    # Start values that have almost decayed may vanish where the definition keeps them.
    assert (np.abs(updates - expected) <= tolerance * size + 1e-30).all()


@law(
    drawn=cases(tuple(form for form in WIDE if form.leaves == 'one')),
    g=gradients(-8, 8),
    power=st.integers(-22, 40),
)
def test_steps_do_not_depend_on_the_scale(drawn: Drawn, g: np.ndarray, power: int) -> None:
    """Without epsilon, and by powers of two, to the last bit."""
    form, _, numbers = drawn
    decay = np.maximum(numbers['decay'], np.float32(0.5))
    numbers = numbers | {'eps': np.float32(0), 'start': np.float32(1), 'decay': decay}
    scaled = numbers | {'start': np.float32(4.0**power)}
    updates, state = run(Drawn(form, g, numbers))
    other, other_state = run(Drawn(form, g * np.float32(2.0**power), scaled))
    np.testing.assert_array_equal(other, updates)
    for name in ('nu', 'var'):
        moment = optax.tree.get(state, name)
        if moment is not None:
            there = np.asarray(optax.tree.get(other_state, name), np.float64)
            np.testing.assert_array_equal(there, np.asarray(moment, np.float64) * 4.0**power)


@functools.cache
def corrected(eps_in_sqrt: bool) -> Callable[..., Any]:
    def first(decay: Any, g: Any) -> Any:
        tx = rmsprop_jax.scale_by_rms(decay, 0.0, 0.0, eps_in_sqrt, bias_correction=True)
        return tx.update(g, tx.init(g))[0]

    return jax.jit(first)


@law(decay=decays, g=gradients(-100, 100, (ENTRIES,)), eps_in_sqrt=st.booleans())
def test_the_first_corrected_step_has_unit_size(
    decay: np.float32, g: np.ndarray, eps_in_sqrt: bool
) -> None:
    update = np.asarray(corrected(eps_in_sqrt)(decay, g))
    square = np.square(g.astype(np.float64)) * (1 - float(decay))
    counts = (square > 1.01 * TINY) & (square / (1 - float(decay)) < 2.0**127.9)
    np.testing.assert_allclose(update[counts], np.sign(g[counts]), rtol=4 * EPS32)
    # Where the square overflows or vanishes there is no step, and never a longer one.
    assert (np.abs(update) <= 1 + 4 * EPS32).all()
    assert not update[(square < 0.99 * TINY) | (np.abs(g) > 2.0**64.01)].any()


@functools.cache
def moments_of(centered: bool) -> Callable[..., Any]:
    def states(decay: Any, start: Any, g: Any) -> Any:
        tx = rmsprop_jax.scale_by_rms(decay, 0.0, start, centered=centered)

        def step(state: Any, x: Any) -> tuple[Any, Any]:
            update, after = tx.update(x, state)
            return after, (update, state, after)

        return jax.lax.scan(step, tx.init(g[0]), g)[1]

    return jax.jit(states)


@law(
    decay=decays,
    start=real(0.0, 2.0**60),
    g=gradients(-100, 63),
    shrink=st.integers(0, 60),
)
def test_the_second_moment_is_bounded_and_monotonic(
    decay: np.float32, start: np.float32, g: np.ndarray, shrink: int
) -> None:
    update, before, after = moments_of(False)(decay, start, g)
    old, new = (np.asarray(x.nu, np.float64) for x in (before, after))
    square = np.square(g.astype(np.float64))
    slack = 1 + 4 * EPS32
    assert (new >= 0).all()
    assert (new <= np.maximum(old, square) * slack + TINY).all()
    assert (new >= np.minimum(old, square) / slack - TINY).all()
    bound = slack / np.sqrt(1 - np.float64(decay))
    assert (np.abs(np.asarray(update, np.float64)) <= bound * slack).all()
    # Smaller gradients never have larger moments, and rounding does not change that.
    _, _, less = moments_of(False)(decay, start, g * np.float32(2.0**-shrink))
    assert (np.asarray(less.nu) <= np.asarray(after.nu)).all()
    _, _, more = moments_of(False)(decay, start + np.float32(1), g)
    assert (np.asarray(more.nu) >= np.asarray(after.nu)).all()


@law(decay=decays, start=real(0.0, 2.0**60), g=gradients(-100, 62))
def test_the_variance_is_bounded(decay: np.float32, start: np.float32, g: np.ndarray) -> None:
    # Decays of no use, below 1e-13, make more of the rounding of the mean than the variance is.
    hypothesis.assume(decay == 0 or decay > 1e-6)
    _, before, after = moments_of(True)(decay, start, g)
    old, new, mean = (np.asarray(x, np.float64) for x in (before.var, after.var, before.mu))
    square = (g.astype(np.float64) - mean) ** 2
    assert (new >= 0).all()
    # The mean after the step, from which it is computed, is rounded, and the square of that
    # weighted with (1 - decay) / decay.
    share = (1 - float(decay)) / float(decay) if decay else 0.0
    rounding = (4 * EPS32 * np.maximum(np.abs(g), np.abs(mean))) ** 2 * share
    assert (new <= np.maximum(old, square) * (1 + 64 * EPS32) + rounding + TINY).all()
    largest = np.maximum.accumulate(np.abs(g), 0)
    assert (np.abs(np.asarray(after.mu)) <= largest * (1 + 8 * EPS32)).all()


Pairs = dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]
ALIKE: Pairs = {
    'torch': (
        lambda n: dialects.torch(n['rate'], n['decay'], n['eps']),
        lambda n: rmsprop_jax.rmsprop(n['rate'], n['decay'], n['eps'], eps_in_sqrt=False),
    ),
    'torch with a constant rate': (
        lambda n: dialects.torch(n['rate'], n['decay'], n['eps'], momentum=n['momentum']),
        lambda n: rmsprop_jax.rmsprop(
            n['rate'], n['decay'], n['eps'], eps_in_sqrt=False, momentum=n['momentum']
        ),
    ),
    'keras': (
        lambda n: dialects.keras(n['rate'], n['decay'], n['momentum'], n['eps']),
        lambda n: rmsprop_jax.rmsprop(n['rate'], n['decay'], n['eps'], momentum=n['momentum']),
    ),
    'tensorflow': (
        lambda n: dialects.tensorflow(n['rate'], n['decay'], n['momentum'], n['eps']),
        lambda n: rmsprop_jax.rmsprop(n['rate'], n['decay'], n['eps'], 1.0, momentum=n['momentum']),
    ),
    'timm is tensorflow': (
        lambda n: dialects.timm(n['rate'], n['decay'], n['eps'], momentum=n['momentum']),
        lambda n: dialects.tensorflow(n['rate'], n['decay'], n['momentum'], n['eps']),
    ),
    'stable_baselines3 is timm with the rate outside': (
        lambda n: dialects.stable_baselines3(
            n['rate'], n['decay'], n['eps'], momentum=n['momentum']
        ),
        lambda n: dialects.timm(
            n['rate'], n['decay'], n['eps'], momentum=n['momentum'], lr_in_momentum=False
        ),
    ),
    'no decay of the past is the sign': (
        lambda n: dialects.hinton(n['rate'], 0.0),
        lambda n: optax.chain(optax.stateless(_signs), optax.scale(-n['rate'])),
    ),
    'momentum of zero': (
        lambda n: rmsprop_jax.rmsprop(n['rate'], n['decay'], n['eps'], momentum=0.0 * n['rate']),
        lambda n: rmsprop_jax.rmsprop(n['rate'], n['decay'], n['eps']),
    ),
    'optax': (
        lambda n: optax.rmsprop(n['rate'], n['decay'], n['eps'], momentum=n['momentum']),
        lambda n: rmsprop_jax.rmsprop(n['rate'], n['decay'], n['eps'], momentum=n['momentum']),
    ),
}


def _signs(g: Any, _: Any) -> Any:
    return jnp.sign(g)


@functools.cache
def both(name: str) -> Callable[..., Any]:
    def updates(numbers: Any, g: Any) -> Any:
        def one(make: Callable[[Any], Any]) -> Any:
            tx = make(numbers)
            params = jnp.zeros(ENTRIES)

            def step(state: Any, x: Any) -> Any:
                u, state = tx.update(x, state, params)
                return state, u

            return jax.lax.scan(step, tx.init(params), g)[1]

        return [one(make) for make in ALIKE[name]]

    return jax.jit(updates)


@law(name=st.sampled_from(sorted(ALIKE)), drawn=cases((Form(momentum=True),)))
def test_dialects_that_are_alike(name: str, drawn: Drawn) -> None:
    # Optax divides by zero without epsilon; the sign is that of gradients whose square counts.
    eps = np.maximum(drawn.numbers['eps'], np.float32(1e-8))
    g = drawn.g
    if 'sign' in name:
        g = np.where((np.abs(g) < 1e-18) | (np.abs(g) > 1e18), 0, g).astype(np.float32)
    one, other = both(name)(drawn.numbers | {'eps': eps}, g)
    assert_close(one, other, drawn.form)


# --- What is kept --------------------------------------------------------------------------------

FORMATS = {
    'bfloat16': storage.bfloat16(),
    'uint8': storage.uint8(),
    'moved': storage.uint8(scale=2.0**-20),
}


@functools.cache
def coded(name: str) -> Callable[..., Any]:
    kept = FORMATS[name]

    def both_ways(x: Any, bits: Any, unit: Any) -> Any:
        random = kept.decode(kept.encode(x, bits, unit), unit)
        nearest = kept.decode(kept.encode(x, None, unit), unit)
        again = kept.decode(kept.encode(nearest, None, unit), unit)
        order = kept.decode(kept.encode(jnp.sort(x), None, unit), unit)
        return random, nearest, again, order

    return jax.jit(both_ways)


@law(
    name=st.sampled_from(sorted(FORMATS)),
    x=gradients(-120, 120, (ENTRIES,)),
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=ENTRIES, max_size=ENTRIES),
    unit=real(1.0, 1.9999998),
)
def test_formats_keep_numbers_within_their_bounds(
    name: str, x: np.ndarray, bits: list[int], unit: np.float32
) -> None:
    kept = FORMATS[name]
    x = np.abs(x)
    random, nearest, again, order = (
        np.asarray(y, np.float64) for y in coded(name)(x, np.array(bits, np.uint32), unit)
    )
    low, high = kept.smallest * float(unit), kept.largest * float(unit)
    wide = x.astype(np.float64)
    inside = (wide > low * 1.0001) & (wide < high / 1.0001)
    # The distance of two neighbours over the lower one.
    coarse = 2.0**-7 if name == 'bfloat16' else 1.0
    fine = (wide >= kept_scale(kept) * 2.0**-40 * unit * 2) & (wide < kept_scale(kept) * unit / 2)
    step = np.where(fine & (name != 'bfloat16'), 0.25, coarse) * (1 + 1e-5)
    # The lower neighbour is not larger than the number.
    assert (np.abs(random - wide) <= step * wide)[inside].all()
    assert (np.abs(nearest - wide) <= step / 2 * wide)[inside].all()
    # Zero is zero, nothing else is, and what lies outside is kept as the ends.
    for y in (random, nearest):
        np.testing.assert_array_equal(y == 0, x == 0)
        np.testing.assert_allclose(y[(wide < low) & (x > 0)], low, rtol=step.max())
        np.testing.assert_allclose(y[wide > high], high, rtol=step.max())
    np.testing.assert_array_equal(again, nearest)
    assert (np.diff(order) >= 0).all()


def kept_scale(kept: Any) -> float:
    return getattr(kept, 'scale', 1.0)


@functools.cache
def factors() -> Callable[..., Any]:
    kept = storage.factored()
    return jax.jit(lambda x: (kept.encode(x), kept.decode(kept.encode(x))))


@law(row=gradients(-20, 20, (4,)), col=gradients(-20, 20, (5,)), x=gradients(-30, 30, (4, 5)))
def test_factors_keep_means_and_products(row: np.ndarray, col: np.ndarray, x: np.ndarray) -> None:
    product = np.abs(np.outer(row, col))
    _, decoded = factors()(product)
    np.testing.assert_allclose(decoded, product, rtol=16 * EPS32, atol=4 * TINY)
    (rows, cols), decoded = factors()(np.abs(x))
    np.testing.assert_allclose(np.mean(decoded, 1), rows, rtol=32 * EPS32, atol=1e-30)
    np.testing.assert_allclose(np.mean(decoded, 0), cols, rtol=32 * EPS32, atol=1e-30)
    assert (np.asarray(decoded) >= 0).all()


@law(drawn=cases(WIDE))
def test_states_come_back_from_bytes(drawn: Drawn) -> None:
    serialization = pytest.importorskip('flax.serialization')
    form, g, numbers = drawn
    _, state = run(drawn)
    first = jax.tree.map(lambda x: x[0], form.tree(g))
    template = form.build(numbers).init(first)
    stored = serialization.to_bytes(state)
    chex.assert_trees_all_equal(serialization.from_bytes(template, stored), state)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state)


@law(drawn=cases((Form(momentum=True), Form(eps_in_sqrt=False))))
def test_states_come_back_from_optax(drawn: Drawn) -> None:
    """What they hold moves to the other library and back without a bit lost."""
    form, g, numbers = drawn
    g = np.clip(g, -1e18, 1e18)
    _, state = run(Drawn(form, g, numbers))
    here = form.build(numbers)
    momentum = 0.9 if form.momentum else None
    theirs = optax.rmsprop(0.1, eps_in_sqrt=form.eps_in_sqrt, momentum=momentum)
    params = jnp.zeros(ENTRIES)
    moved = interchange.to_optax(state, theirs, params)
    back = interchange.from_optax(moved, here, params, count=STEPS)
    chex.assert_trees_all_equal(back, state)


# --- Faults --------------------------------------------------------------------------------------


@functools.cache
def skipping(form: Form) -> Callable[..., Any]:
    def updates(numbers: Any, g: Any) -> Any:
        tx = rmsprop_jax.skip_nonfinite(form.build(numbers))

        def step(state: Any, x: Any) -> Any:
            u, state = tx.update(x, state)
            return state, u

        state, u = jax.lax.scan(step, tx.init(g[0]), g)
        return u, state.total_notfinite

    return jax.jit(updates)


@law(
    drawn=cases((Form(), Form(momentum=True, nesterov=True), Form(centered=True))),
    bad=st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=32, max_size=32),
)
def test_skipped_coordinates_take_the_steps_of_their_finite_gradients(
    drawn: Drawn, bad: list[int]
) -> None:
    form, g, numbers = drawn
    kind = np.array(bad).reshape(STEPS, ENTRIES)
    spoilt = np.choose(kind, [g, np.nan, np.inf, -np.inf]).astype(np.float32)
    updates, count = skipping(form)(numbers, spoilt)
    order = np.argsort(kind > 0, axis=0, kind='stable')
    alone = np.take_along_axis(np.where(kind > 0, 0, g), order, 0)
    taken = np.take_along_axis(kind == 0, order, 0)
    expected, _ = run(Drawn(form, alone, numbers))
    got = np.take_along_axis(np.asarray(updates), order, 0)
    assert_close(np.where(taken, got, 0), np.where(taken, expected, 0), form)
    assert not got[~taken].any()
    assert count == (kind > 0).sum()
