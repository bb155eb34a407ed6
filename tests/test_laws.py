"""What holds for all gradients and hyperparameters, looked for with drawn ones.

Each law is tried on a few cases, and on many by `make slow`: always the same, so that a failure is
the doing of a change. `make laws` draws new ones. Programs are compiled once for each form; numbers
are their arguments, so that a case costs milliseconds.
"""

import functools
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import formula
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from forms import FORMS, Form, forms
from formula import EPS, SMALLEST, TINY, Near
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from measuring import measured_once

import rmsprop_jax
from rmsprop_jax import dialects, interchange, sharding, storage

STEPS, ENTRIES = 4, 8

pytestmark = pytest.mark.extended

ALWAYS = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile('few', ALWAYS, max_examples=12)
settings.register_profile('many', ALWAYS, max_examples=100)
CASES = int(os.environ.get('CASES', '2000'))
settings.register_profile('new', ALWAYS, max_examples=CASES, derandomize=False)
settings.load_profile(os.environ.get('LAWS', 'few'))


# --- What is drawn -------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A configuration, gradients of shape (steps, entries), and numbers."""

    form: Form
    g: np.ndarray
    numbers: dict[str, np.float32]


def gradients(low: int, high: int, shape: tuple[int, ...] = (STEPS, ENTRIES)) -> Any:
    """Arrays of zeros and of numbers of both signs from 2^low to 2^high, all magnitudes alike.

    They have seven bits, as bfloat16 has. All are drawn at once, since that is what takes time.
    """
    size = 4 * int(np.prod(shape))

    def build(drawn: bytes) -> np.ndarray:
        index = np.frombuffer(drawn, np.uint32).astype(np.int64)
        whole, part = np.divmod((index >> 4) * (high - low) * 64 >> 28, 64)
        sign = np.where(index & 7, np.where(index & 8, -1, 1), 0)
        x = sign * np.ldexp(1 + part / 64, (low + whole).astype(int))
        return x.astype(np.float32).reshape(shape)

    return st.binary(min_size=size, max_size=size).map(build)


@st.composite
def alike(draw: st.DrawFn, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
    """Those, or some that are near each other, so that averages mix them."""
    if draw(st.booleans()):
        middle = draw(st.integers(low + 2, high - 2))
        low, high = middle - 2, middle + 2
    return draw(gradients(low, high, shape))


def real(low: float, high: float) -> st.SearchStrategy[np.float32]:
    ends = np.float32(low).item(), np.float32(high).item()
    return st.floats(*ends, width=32, allow_subnormal=False).map(np.float32)


def zero_or(numbers: st.SearchStrategy) -> st.SearchStrategy:
    """Factors below 1e-38, which a schedule may halve, count as zero and are worth nothing."""
    return st.one_of(st.just(np.float32(0)), numbers)


# Decays of no use, below 1e-13, make more of the rounding of a mean than a variance is.
decays = st.one_of(real(2.0**-5, 0.9375), st.sampled_from([0.0, 0.9, 0.99, 0.999]).map(np.float32))


@st.composite
def cases(draw: st.DrawFn, among: Sequence[Form] = FORMS) -> Drawn:
    """Gradients from 1e-30 to 1e30, and any numbers, zeros too."""
    form = draw(st.sampled_from(among))
    shape = (form.steps, form.entries)
    # The largest mean of squares over the smallest is a float32 where they are factored.
    limit = {'float16': 14}.get(form.dtype, 30 if form.kept == 'factored' else 100)
    g = draw(alike(-limit, limit, shape))
    if form.is_complex:
        g = g + 1j * draw(alike(-limit, limit, shape))
    # From a start of their size variances are far from the rounding of the mean.
    scale = min(float(np.abs(g).max(initial=0)) ** 2, 2.0**120) if draw(st.booleans()) else 1.0
    # Parts of what is smaller are subnormal, which counts as zero.
    scale = scale if scale > 16 * TINY else 0.0
    numbers = {
        'rate': draw(zero_or(real(2.0**-20, 8.0))),
        'decay': draw(st.one_of(decays, real(0.9375, 0.999))),
        'eps': np.float32(draw(st.sampled_from([0.0, 1e-8, 1e-3, 2.0]))),
        'start': np.float32(scale * draw(zero_or(real(0.125, 1.0)))),
        'momentum': draw(zero_or(real(2.0**-20, 0.9375))),
    }
    return Drawn(form, g, numbers)


# --- Runs, and what is near ----------------------------------------------------------------------


class Step(NamedTuple):
    """A step of a run.

    Attributes:
      gradient: A tree.
      before: The state before.
      known: Its statistics, decoded and flat, by name.
      update: A tree.
      after: The state after.
      found: The update and the statistics after, decoded and flat, by name.
      bounds: What they are near, by the formula, from the state before.
    """

    gradient: Any
    before: Any
    known: dict[str, np.ndarray]
    update: Any
    after: Any
    found: dict[str, np.ndarray]
    bounds: dict[str, Near]


def decoding(form: Form, state: Any) -> tuple[Any, Any]:
    return state, storage.read(state, form.storage)


@functools.cache
def starting(form: Form) -> Callable[..., Any]:
    return jax.jit(lambda numbers, params: decoding(form, form.build(numbers).init(params)))


def stepped(form: Form, numbers: Any, g: Any, state: Any) -> tuple[Any, Any, Any]:
    """The update, the state after, and that decoded."""
    update, after = form.build(numbers).update(g, state)
    return update, *decoding(form, after)


@functools.cache
def single(form: Form) -> Callable[..., Any]:
    return jax.jit(functools.partial(stepped, form))


def entry(tree: Any, *index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def found_in(form: Form, update: Any, state: Any, decoded: Any) -> dict[str, np.ndarray]:
    return {'update': form.flat(update), **form.statistics(state, decoded)}


def run(drawn: Drawn) -> list[Step]:
    """Its steps, one program each."""
    form, g, numbers = drawn
    tree, steps = form.tree(g), []
    before, decoded = starting(form)(numbers, entry(tree, 0))
    known = form.statistics(before, decoded)
    for t in range(form.steps):
        gradient = entry(tree, t)
        bounds = formula.step(form, numbers, t, form.flat(gradient), known)
        update, after, decoded = single(form)(numbers, gradient, before)
        found = found_in(form, update, after, decoded)
        steps.append(Step(gradient, before, known, update, after, found, bounds))
        before, known = after, form.statistics(after, decoded)
    return steps


def assert_near(got: dict[str, np.ndarray], bounds: dict[str, Near]) -> None:
    """Each entry within its own bound, and what is not finite of the same kind."""
    assert set(got) == set(bounds)
    for name, (value, slack) in bounds.items():
        x = got[name]
        known = np.isfinite(slack)
        finite = np.isfinite(x) & np.isfinite(value)
        np.testing.assert_array_equal(
            np.where(known & ~finite, x, 0), np.where(known & ~finite, value, 0), err_msg=name
        )
        apart = np.abs(np.where(finite, x, 0) - np.where(finite, value, 0))
        assert (apart <= slack).all(), (name, x, value, slack)


def assert_same_step(form: Form, update: Any, after: Any, decoded: Any, step: Step) -> None:
    """The step of another program: both are within the bounds of the formula.

    Of the numbers that are rounded at random, by the same bits, one may have fallen to the other
    side. Where one program contracts a product and a sum and another does not, that happens to one
    in 2^16.
    """
    near = {name: Near(step.found[name], 2 * x.slack) for name, x in step.bounds.items()}
    assert_near(found_in(form, update, after, decoded), near)
    other = 0
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(step.after), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if x.dtype == np.int32:
            np.testing.assert_array_equal(x, y)
        elif x.dtype.itemsize < 4:
            # What underflows is zero in one program, and kept as the smallest number in another.
            smallest = SMALLEST['bfloat16'] if x.dtype == jnp.bfloat16 else 1
            x, y = x.astype(float), y.astype(float)
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            other += np.sum(~same & ~(np.maximum(np.abs(x), np.abs(y)) <= smallest))
    assert other <= 1


# --- One program and another ---------------------------------------------------------------------


@given(drawn=cases())
def test_every_step_is_that_of_its_formula(drawn: Drawn) -> None:
    for step in run(drawn):
        assert_near(step.found, step.bounds)
        assert jax.tree.leaves(step.after)[0] == jax.tree.leaves(step.before)[0] + 1


@functools.cache
def scanned(form: Form) -> Callable[..., Any]:
    def states(numbers: Any, g: Any, state: Any) -> Any:
        def step(state: Any, x: Any) -> tuple[Any, Any]:
            update, after, decoded = stepped(form, numbers, x, state)
            return after, (update, after, decoded)

        return jax.lax.scan(step, state, g)[1]

    return jax.jit(states)


@given(drawn=cases())
def test_scan_equals_loop(drawn: Drawn) -> None:
    """Each step from the state that the scan had: what is rounded at random may part for good."""
    form, g, numbers = drawn
    tree = form.tree(g)
    before, decoded = starting(form)(numbers, entry(tree, 0))
    all_steps = jax.tree.map(np.asarray, scanned(form)(numbers, tree, before))
    for t in range(form.steps):
        known, gradient = form.statistics(before, decoded), entry(tree, t)
        bounds = formula.step(form, numbers, t, form.flat(gradient), known)
        update, after, decoded = entry(all_steps, t)
        found = found_in(form, update, after, decoded)
        one = Step(gradient, before, known, update, after, found, bounds)
        assert_same_step(form, *single(form)(numbers, gradient, before), one)
        before = after


# Of two shapes: meshes divide them, and without jit each operation is compiled for each shape.
LEAVES = tuple(form._replace(shapes=((4, 4), (8,)), steps=2) for form in FORMS)


@given(drawn=cases(LEAVES), t=st.integers(0, 1))
def test_jit_equals_no_jit(drawn: Drawn, t: int) -> None:
    form, _, numbers = drawn
    step = run(drawn)[t]
    tx = form.build(jax.tree.map(jnp.asarray, numbers))
    update, after = tx.update(jax.tree.map(jnp.asarray, step.gradient), step.before)
    assert_same_step(form, update, *decoding(form, after), step)


@functools.cache
def batched(form: Form) -> Callable[..., Any]:
    return jax.jit(jax.vmap(functools.partial(stepped, form)))


@given(drawn=st.sampled_from(FORMS).flatmap(lambda form: st.tuples(*[cases((form,))] * 2)))
def test_vmap_equals_loop(drawn: tuple[Drawn, ...]) -> None:
    """Over gradients, states and all hyperparameters at once: all steps of two runs."""
    form = drawn[0].form
    steps = [(one.numbers, step) for one in drawn for step in run(one)]
    whole = [(numbers, step.gradient, step.before) for numbers, step in steps]
    together = batched(form)(*jax.tree.map(lambda *x: np.stack(x), *whole))
    together = jax.tree.map(np.asarray, together)
    for i, (_, step) in enumerate(steps):
        assert_same_step(form, *entry(together, i), step)


# How the matrix and the vector lie on a mesh of two axes.
PLACES = {
    'rows': (P('x'), P('x')),
    'columns': (P(None, 'y'), P()),
    'both': (P('x', 'y'), P(('x', 'y'))),
    'other': (P('y', 'x'), P('y')),
    'explicit': (P('y', 'x'), P('x')),
    'zero1': (P(None, 'y'), P()),
}
SHARDED = dict(zip(LEAVES, sorted(PLACES) * len(LEAVES), strict=False))


@functools.cache
def on_mesh(form: Form) -> tuple[Any, Callable[..., Any]]:
    """Shardings like the parameters, and the step, whose state is given in anywhere."""
    name = SHARDED[form]
    kind = AxisType.Explicit if name == 'explicit' else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ('x', 'y'), axis_types=(kind,) * 2)
    matrix, vector = (NamedSharding(mesh, spec) for spec in PLACES[name])
    places = {'b': matrix, 'a': ([vector], {'c': []})}
    like = jax.eval_shape(lambda: form.tree(np.zeros(form.entries)))

    def build(numbers: Any) -> Any:
        tx = form.build(numbers)
        return sharding.zero1(tx, like, places, 'x') if name == 'zero1' else tx

    def step(numbers: Any, g: Any, state: Any) -> Any:
        update, after = build(numbers).update(g, state)
        return update, *decoding(form, after)

    return places, jax.jit(step)


@given(drawn=cases(LEAVES), t=st.integers(0, 1))
def test_sharded_equals_whole(drawn: Drawn, t: int) -> None:
    form, _, numbers = drawn
    step = run(drawn)[t]
    places, sharded = on_mesh(form)
    g = jax.device_put(step.gradient, places)
    wanted = sharding.state_shardings(form.build(numbers), g)
    update, after, decoded = sharded(numbers, g, jax.device_put(step.before, wanted))
    assert len(update['b'].sharding.device_set) == 8
    assert_same_step(form, update, after, decoded, step)


# One leaf in float32, whatever else.
WHOLE = forms(2, lambda _: {'shapes': ((ENTRIES,),), 'steps': 3}, kept=('float32',))


@given(drawn=cases(WHOLE), random=st.randoms())
def test_order_does_not_matter(drawn: Drawn, random: Any) -> None:
    """Of what is not rounded at random, which the index decides."""
    form, g, numbers = drawn
    order = np.array(random.sample(range(ENTRIES), ENTRIES))
    for step, other in zip(run(drawn), run(Drawn(form, g[:, order], numbers)), strict=True):
        for name, x in other.found.items():
            np.testing.assert_array_equal(x, step.found[name][..., order] if x.shape else x)


def among(form: Form, known: dict[str, np.ndarray], state: Any) -> Any:
    """`state` with these statistics in the place of its own."""

    def tree(name: str) -> Any:
        is_complex = name in ('mu', 'trace') and form.is_complex
        return form._replace(dtype='complex64' if is_complex else 'float32').tree(known[name])

    rms, *others = state
    names = known.keys() & {'nu', 'mu', 'var'}
    rms = rms._replace(**{name: tree(name) for name in names})
    if form.corrected:
        rms = rms._replace(weight=np.float32(known['weight']))
    if form.velocity != 'none':
        others[-1] = others[-1]._replace(trace=tree('trace'))
    return (rms, *others)


# The same entries as other leaves, in another order of the tree.
PARTS = {
    form: form._replace(shapes=(((2, 1, 2), (), (3,)), ((3,), (5,)), ((1, 1), (7,)))[i % 3])
    for i, form in enumerate(WHOLE)
}


@given(drawn=cases(WHOLE))
def test_leaves_may_be_split(drawn: Drawn) -> None:
    """One step over several leaves is one over all as one leaf, with state in float32."""
    form, g, numbers = drawn
    parts = PARTS[form]
    state, _ = starting(parts)(numbers, entry(parts.tree(g), 0))
    for t, step in enumerate(run(drawn)):
        update, after, decoded = single(parts)(numbers, entry(parts.tree(g), t), state)
        near = {name: Near(step.found[name], 2 * x.slack) for name, x in step.bounds.items()}
        assert_near(found_in(parts, update, after, decoded), near)
        state = among(parts, step.found, after)


# --- The mathematics -----------------------------------------------------------------------------


WIDE = tuple(form for form in WHOLE if form.dtype in ('float32', 'complex64'))


@given(drawn=cases(tuple(form for form in WIDE if not form.centered)))
def test_updates_are_those_of_the_definition(drawn: Drawn) -> None:
    """Weighted means of all past squares, in extended precision; within what squares hold."""
    form, g, numbers = drawn
    size = np.abs(g)
    g = np.where((size < 1e-15) | (size > 1e18), 0, g).astype(g.dtype)
    # The correction of the first steps divides by 0.001 or more.
    numbers = numbers | {'start': np.minimum(numbers['start'], np.float32(2.0**117))}
    updates = np.stack([step.found['update'] for step in run(Drawn(form, g, numbers))])
    at = [form.at(numbers, t) for t in range(form.steps)]
    rate, decay, eps, momentum = (
        [n[name] for n in at] for name in ('rate', 'decay', 'eps', 'momentum')
    )
    expected = reference.rmsprop_updates(
        g,
        rate,
        None if form.velocity == 'none' else momentum,
        form.velocity == 'nesterov',
        decays=decay,
        eps=eps,
        initial_scale=at[-1]['start'],
        eps_in_sqrt=form.eps_in_sqrt,
        bias_correction=form.corrected,
    ).astype(updates.dtype)
    # A float32 decay has a complement that is right to its own rounding.
    tolerance = EPS * (8 + form.steps / (1 - max(decay)))
    # A velocity is as right as the largest it has been.
    size = np.abs(expected)
    size = size if form.velocity == 'none' else 2 * form.steps * np.maximum.accumulate(size)
    # Start values that have almost decayed may vanish where the definition keeps them.
    assert (np.abs(updates - expected) <= tolerance * size + 1e-30).all()


SCALED = tuple(
    form
    for form in FORMS + WHOLE
    if form.dtype != 'float16' and form.kept != 'uint8' and form.given != 'floats'
)


@given(drawn=cases(SCALED), data=st.data(), power=st.integers(-22, 40))
def test_steps_do_not_depend_on_the_scale(drawn: Drawn, data: st.DataObject, power: int) -> None:
    """Without epsilon, and by powers of two, to the last bit."""
    form, _, numbers = drawn
    g = data.draw(gradients(-8, 8, (form.steps, form.entries)))
    if form.is_complex:
        g = g + 1j * data.draw(gradients(-8, 8, g.shape))
    decay = np.maximum(numbers['decay'], np.float32(0.5))
    numbers = numbers | {'eps': np.float32(0), 'start': np.float32(1), 'decay': decay}
    scaled = numbers | {'start': np.float32(4.0**power)}
    others = run(Drawn(form, g * 2.0**power, scaled))
    for step, other in zip(run(Drawn(form, g, numbers)), others, strict=True):
        for name, x in step.found.items():
            factor = {'nu': 4.0, 'var': 4.0, 'mu': 2.0}.get(name, 1.0)
            np.testing.assert_array_equal(other.found[name], x * factor**power, err_msg=name)


@functools.cache
def corrected(eps_in_sqrt: bool) -> Callable[..., Any]:
    def first(decay: Any, g: Any) -> Any:
        tx = rmsprop_jax.scale_by_rms(decay, 0.0, 0.0, eps_in_sqrt, bias_correction=True)
        return tx.update(g, tx.init(g))[0]

    return jax.jit(first)


@given(decay=decays, g=gradients(-100, 100, (ENTRIES,)), eps_in_sqrt=st.booleans())
def test_the_first_corrected_step_has_unit_size(
    decay: np.float32, g: np.ndarray, eps_in_sqrt: bool
) -> None:
    update = np.asarray(corrected(eps_in_sqrt)(decay, g))
    square = np.square(g.astype(np.float64)) * (1 - float(decay))
    counts = (square > 1.01 * TINY) & (square / (1 - float(decay)) < 2.0**127.9)
    np.testing.assert_allclose(update[counts], np.sign(g[counts]), rtol=4 * EPS)
    # Where the square overflows or vanishes there is no step, and never a longer one.
    assert (np.abs(update) <= 1 + 4 * EPS).all()
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


@given(
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
    slack = 1 + 4 * EPS
    assert (new >= 0).all()
    assert (new <= np.maximum(old, square) * slack + TINY).all()
    # Both of the products of which it is the sum may underflow.
    assert (new >= np.minimum(old, square) / slack - 2 * TINY).all()
    bound = slack / np.sqrt(1 - np.float64(decay))
    assert (np.abs(np.asarray(update, np.float64)) <= bound * slack).all()
    # Smaller gradients never have larger moments, and rounding does not change that.
    _, _, less = moments_of(False)(decay, start, g * np.float32(2.0**-shrink))
    assert (np.asarray(less.nu) <= np.asarray(after.nu)).all()
    _, _, more = moments_of(False)(decay, start * np.float32(2), g)
    assert (np.asarray(more.nu) >= np.asarray(after.nu)).all()


@given(decay=decays, start=real(0.0, 2.0**60), g=gradients(-100, 62))
def test_the_variance_is_bounded(decay: np.float32, start: np.float32, g: np.ndarray) -> None:
    _, before, after = moments_of(True)(decay, start, g)
    old, new, mean = (np.asarray(x, np.float64) for x in (before.var, after.var, before.mu))
    square = (g.astype(np.float64) - mean) ** 2
    assert (new >= 0).all()
    # The mean after the step, from which it is computed, is rounded, and the square of that
    # weighted with (1 - decay) / decay.
    share = (1 - float(decay)) / float(decay) if decay else 0.0
    rounding = (4 * EPS * np.maximum(np.abs(g), np.abs(mean))) ** 2 * share
    assert (new <= np.maximum(old, square) * (1 + 64 * EPS) + rounding + TINY).all()
    largest = np.maximum.accumulate(np.abs(g), 0)
    assert (np.abs(np.asarray(after.mu)) <= largest * (1 + 8 * EPS)).all()


# --- Wrappers ------------------------------------------------------------------------------------


ARRAYS = tuple(form for form in FORMS if form.given == 'arrays')


@functools.cache
def injected(form: Form) -> Callable[..., Any]:
    factory = rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)
    moving = {} if form.velocity == 'none' else {'momentum': 0.5}

    def step(numbers: Any, g: Any, before: Any) -> Any:
        tx = factory(
            0.5,
            0.5,
            0.5,
            eps_in_sqrt=form.eps_in_sqrt,
            centered=form.centered,
            nesterov=form.velocity == 'nesterov',
            bias_correction=form.corrected,
            storage=form.storage,
            **moving,
        )
        state = tx.init(g)
        names = {'learning_rate': 'rate', 'decay': 'decay', 'eps': 'eps', 'momentum': 'momentum'}
        now = {name: numbers[names[name]] for name in names.keys() & state.hyperparams.keys()}
        now = {**state.hyperparams, **now}
        update, after = tx.update(g, state._replace(hyperparams=now, inner_state=before))
        return update, *decoding(form, after.inner_state)

    return jax.jit(step)


@given(drawn=cases(ARRAYS))
def test_injected_hyperparameters_are_those_of_the_step(drawn: Drawn) -> None:
    """Whatever they were before."""
    for step in run(drawn):
        got = injected(drawn.form)(drawn.numbers, step.gradient, step.before)
        assert_same_step(drawn.form, *got, step)


def has_coordinates(form: Form) -> bool:
    return form.kept != 'factored' or form.centered


def spread(form: Form, marks: Any) -> np.ndarray:
    """One boolean for each entry, of one for each leaf or of one for all."""
    leaves = [np.broadcast_to(x, s) for x, s in zip(marks, form.shapes, strict=True)]
    return np.concatenate([np.ravel(x) for x in leaves]).astype(bool)


@functools.cache
def resetting(form: Form) -> Callable[..., Any]:
    def change(numbers: Any, state: Any, params: Any, mask: Any) -> Any:
        tx = form.build(numbers)
        return decoding(form, rmsprop_jax.reset(tx, state, params, mask, form.storage))

    return jax.jit(change)


@given(drawn=cases(), chosen=st.lists(st.booleans(), min_size=24, max_size=24), whole=st.booleans())
def test_what_is_reset_starts_again_and_nothing_else(
    drawn: Drawn, chosen: list[bool], whole: bool
) -> None:
    form, _, numbers = drawn
    step = run(drawn)[-1]
    marks = form.split(np.array(chosen[: form.entries]) | whole)
    if not has_coordinates(form):
        marks = [np.asarray(x.any() or not x.size) for x in marks]
    mask = form.arranged(marks)
    after, decoded = resetting(form)(numbers, step.after, step.gradient, mask)
    assert after[0].count == step.after[0].count
    got, flat = form.statistics(after, decoded), spread(form, marks)
    starts = form.at(numbers, 1)['start']
    for name in got.keys() - {'weight', 'unit'}:
        start = starts if name in ('nu', 'var') else 0.0
        start = Near(np.full(form.entries, start), np.full(form.entries, 2 * EPS * start))
        start = formula.kept(form, name, start, step.found.get('unit', np.float64(1)))
        np.testing.assert_array_equal(got[name][~flat], step.found[name][~flat])
        apart = np.abs(got[name] - start.value)
        assert (apart <= start.slack)[flat].all(), name
    if form.corrected:
        again = all(np.all(x) for x in marks)
        np.testing.assert_array_equal(got['weight'], 0 if again else step.found['weight'])


# Whole steps are skipped by Optax, and no sum of weights goes on.
UNITS = {True: ('coordinate', 'leaf'), False: ('coordinate', 'leaf', 'step')}


def unit_of(i: int, form: Form) -> str:
    unit = UNITS[form.corrected][i % len(UNITS[form.corrected])]
    return unit if has_coordinates(form) or unit != 'coordinate' else 'leaf'


SKIPPED = {form: unit_of(i, form) for i, form in enumerate(FORMS)}


@functools.cache
def skipping(form: Form) -> Callable[..., Any]:
    def step(numbers: Any, g: Any, before: Any, total: Any) -> Any:
        tx = rmsprop_jax.skip_nonfinite(form.build(numbers), SKIPPED[form], storage=form.storage)
        state = tx.init(g)._replace(inner_state=before, total_notfinite=total)
        update, after = tx.update(g, state)
        return update, *decoding(form, after.inner_state), after.total_notfinite

    return jax.jit(step)


@given(
    drawn=cases(tuple(SKIPPED)),
    bad=st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=24, max_size=24),
)
def test_what_is_skipped_stays_and_the_rest_takes_its_step(drawn: Drawn, bad: list[int]) -> None:
    form, g, numbers = drawn
    per, kind = SKIPPED[form], np.array(bad[: form.entries])
    marks = form.split(kind > 0)
    if per == 'leaf':
        marks = [x.any() for x in marks]
    elif per == 'step':
        marks = [(kind > 0).any()] * len(marks)
    left_out = spread(form, marks)
    for t, step in enumerate(run(drawn)):
        spoilt = g[t].copy()
        part = spoilt.imag if form.is_complex else spoilt
        part[kind > 0] = np.array([0, np.nan, np.inf, -np.inf])[kind[kind > 0]]
        update, after, decoded, total = skipping(form)(
            numbers, form.tree(spoilt), step.before, np.int32(7)
        )
        if per == 'step' and left_out.any():
            chex.assert_trees_all_equal(after, step.before)
            assert not form.flat(update).any()
            assert total == 8
            continue
        count = sum(int(np.sum(x)) for x in marks)
        assert total == 7 + count
        rest = form.tree(np.where(left_out, 0, g[t]))
        expected = single(form)(numbers, rest, step.before)
        bounds = formula.step(form, numbers, t, form.flat(rest), step.known)
        alone = found_in(form, *expected)
        near = {}
        for name, x in bounds.items():
            there = Near(alone[name], 2 * x.slack)
            stays = standing(form, name, step, bounds)
            choose = left_out if there.value.ndim else False
            near[name] = Near(*(np.where(choose, a, b) for a, b in zip(stays, there, strict=True)))
        assert_near(found_in(form, update, after, decoded), near)


def standing(form: Form, name: str, step: Step, bounds: dict[str, Near]) -> Near:
    """What is left out: no update, and the averages and the velocity that there were."""
    if name not in ('nu', 'mu', 'var', 'trace'):
        return Near(np.zeros(1), np.zeros(1))
    value, slack = step.known[name], np.zeros(form.entries)
    if name == 'trace' or not {'weight', 'unit'} & bounds.keys():
        return Near(value, slack)
    if form.corrected and step.known['weight']:
        # The average is the quotient of the two.
        value = value * (bounds['weight'].value / step.known['weight'])
        slack = np.where(np.isfinite(value), 8 * EPS * np.abs(value) + TINY, 0)
    unit = bounds['unit'].value if 'unit' in bounds else np.float64(1)
    return formula.kept(form, name, Near(value, slack), unit)


@functools.cache
def tracing(dtype: str, nesterov: bool) -> Callable[..., Any]:
    def updates(decay: Any, g: Any) -> Any:
        tx = rmsprop_jax.trace(decay, nesterov)

        def step(state: Any, x: Any) -> tuple[Any, Any]:
            update, state = tx.update(x, state)
            return state, update

        return jax.lax.scan(step, tx.init(g[0]), g)[1]

    return jax.jit(updates)


@given(
    dtype=st.sampled_from(['float32', 'bfloat16', 'float16', 'complex64']),
    nesterov=st.booleans(),
    decay=real(0.0, 0.9375),
    parts=st.tuples(*[alike(-12, 12, (STEPS, ENTRIES))] * 2),
    power=st.integers(-60, 60),
)
def test_velocities_are_decaying_sums(
    dtype: str, nesterov: bool, decay: np.float32, parts: Any, power: int
) -> None:
    g = parts[0] + 1j * parts[1] if dtype == 'complex64' else parts[0]
    g = (g * 2.0 ** (0 if dtype == 'float16' else power)).astype(jnp.dtype(dtype))
    wide = g.astype(complex if dtype == 'complex64' else float)
    got = np.asarray(tracing(dtype, nesterov)(decay, g)).astype(wide.dtype)
    expected = reference.velocities(wide, float(decay), nesterov)
    size = reference.velocities(np.abs(wide), float(decay), nesterov)
    kind = jnp.finfo(dtype)
    slack = 2 * STEPS * EPS * size + float(kind.eps) * np.abs(expected)
    assert (np.abs(got - expected) <= slack + float(kind.smallest_subnormal) + 8 * TINY).all()


# --- Dialects ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two optimizers of the same numbers that are one.

    Attributes:
      kind: What decides how near they are.
    """

    one: Callable[[Any], Any]
    other: Callable[[Any], Any]
    kind: str = 'moving'


def plain(n: Any, **options: Any) -> Any:
    return rmsprop_jax.rmsprop(n['rate'], n['decay'], n['eps'], **options)


def moving(n: Any, **options: Any) -> Any:
    return plain(n, momentum=n['momentum'], **options)


def five(make: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    """Of the dialects that take rate, decay, momentum and epsilon in this order."""
    return lambda n: make(n['rate'], n['decay'], n['momentum'], n['eps'], **options)


ALIKE = {
    'torch': Pair(
        lambda n: dialects.torch(n['rate'], n['decay'], n['eps']),
        lambda n: plain(n, eps_in_sqrt=False),
        'plain',
    ),
    'torch with a constant rate': Pair(
        lambda n: dialects.torch(n['rate'], n['decay'], n['eps'], momentum=n['momentum']),
        lambda n: moving(n, eps_in_sqrt=False),
    ),
    'torch centered': Pair(
        lambda n: dialects.torch(
            n['rate'], n['decay'], n['eps'], momentum=n['momentum'], centered=True
        ),
        lambda n: moving(n, eps_in_sqrt=False, centered=True),
        'centered',
    ),
    'keras': Pair(five(dialects.keras), moving),
    'keras_legacy without momentum is torch': Pair(
        lambda n: dialects.keras_legacy(n['rate'], n['decay'], epsilon=n['eps']),
        lambda n: dialects.torch(n['rate'], n['decay'], n['eps']),
        'plain',
    ),
    'keras_legacy with momentum is keras': Pair(five(dialects.keras_legacy), five(dialects.keras)),
    'tensorflow': Pair(five(dialects.tensorflow), lambda n: moving(n, initial_scale=1.0)),
    'timm is tensorflow': Pair(
        lambda n: dialects.timm(n['rate'], n['decay'], n['eps'], momentum=n['momentum']),
        five(dialects.tensorflow),
    ),
    'stable_baselines3 is timm with the rate outside': Pair(
        lambda n: dialects.stable_baselines3(
            n['rate'], n['decay'], n['eps'], momentum=n['momentum']
        ),
        lambda n: dialects.timm(
            n['rate'], n['decay'], n['eps'], momentum=n['momentum'], lr_in_momentum=False
        ),
    ),
    'mxnet is torch without momentum': Pair(
        five(dialects.mxnet), lambda n: dialects.torch(n['rate'], n['decay'], n['eps']), 'plain'
    ),
    'mxnet1 is keras without momentum': Pair(
        five(dialects.mxnet1),
        lambda n: dialects.keras(n['rate'], n['decay'], epsilon=n['eps']),
        'plain',
    ),
    'mxnet centered is mxnet1': Pair(
        five(dialects.mxnet, centered=True), five(dialects.mxnet1, centered=True), 'centered'
    ),
    'graves is mxnet1': Pair(
        five(dialects.graves), five(dialects.mxnet1, centered=True), 'centered'
    ),
    'graves is optax centered': Pair(
        five(dialects.graves),
        lambda n: optax.rmsprop(
            n['rate'], n['decay'], n['eps'], centered=True, momentum=n['momentum']
        ),
        'subtracted',
    ),
    'no decay of the past is the sign': Pair(
        lambda n: dialects.hinton(n['rate'], 0.0),
        lambda n: optax.chain(optax.stateless(_signs), optax.scale(-n['rate'])),
        'sign',
    ),
    'momentum of zero': Pair(lambda n: plain(n, momentum=0.0 * n['rate']), plain, 'plain'),
    'optax': Pair(
        lambda n: optax.rmsprop(n['rate'], n['decay'], n['eps'], momentum=n['momentum']), moving
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

        return [one(make) for make in (ALIKE[name].one, ALIKE[name].other)]

    return jax.jit(updates)


# A moment takes four roundings a step, and its root has half of their error; root, quotient and
# rate add three, and another program as many. That is 22 half units in the last place.
PLAIN_ERROR = 11 * EPS
# A velocity is a sum of up to STEPS such terms, none larger than twice the largest velocity so far.
MOVING_ERROR = 2 * STEPS * (PLAIN_ERROR + 2 * EPS)
# From a zero start a variance is at least the square of the largest gradient G times (1 - decay) /
# decay decay^(2 + 3 STEPS), and the mean in it is right to 8 EPS G. With decays from 3/4 on their
# quotient is below 16 sqrt(STEPS) / 0.75^7 EPS, of which the root has the half.
CENTERED_ERROR = 2 * STEPS * (120 * EPS + PLAIN_ERROR)
# Moments of gradients up to 2 are at most 4, each of the two that are subtracted is wrong by up to
# four roundings a step, and the epsilon of 2 is what that is relative to; a root has the half.
SUBTRACTED_ERROR = 2 * STEPS * (2 * STEPS * 4 * EPS + PLAIN_ERROR)
ERRORS = {
    'plain': PLAIN_ERROR,
    'sign': PLAIN_ERROR,
    'moving': MOVING_ERROR,
    'centered': CENTERED_ERROR,
    'subtracted': SUBTRACTED_ERROR,
}
MOVING = Form(velocity='momentum', shapes=((ENTRIES,),), steps=STEPS)


@pytest.mark.parametrize('name', ALIKE)
@given(drawn=cases((MOVING,)))
def test_dialects_that_are_alike(name: str, drawn: Drawn) -> None:
    kind, g = ALIKE[name].kind, drawn.g
    # Optax divides by zero without epsilon; the sign is that of gradients whose square counts.
    numbers = drawn.numbers | {'eps': np.maximum(drawn.numbers['eps'], np.float32(1e-8))}
    if kind == 'sign':
        g = np.where((np.abs(g) < 1e-18) | (np.abs(g) > 1e18), 0, g).astype(np.float32)
    if kind == 'subtracted':
        g, numbers = np.clip(g, -2, 2), numbers | {'eps': np.float32(2)}
    if kind == 'centered':
        numbers = numbers | {'decay': np.maximum(numbers['decay'], np.float32(0.75))}
        # A square that overflows is infinite in all of them, but not at the same gradient.
        g = np.clip(g, -1e18, 1e18)
    one, other = (np.asarray(x, np.float64) for x in both(name)(numbers, g))
    finite = np.isfinite(one) & np.isfinite(other)
    np.testing.assert_array_equal(np.where(finite, 0, one), np.where(finite, 0, other))
    one, other = np.where(finite, one, 0), np.where(finite, other, 0)
    size = np.abs(other)
    if kind not in ('plain', 'sign'):
        size = np.maximum.accumulate(size)
    # Terms of a velocity that underflow are of the size of the rate, times that of the smallest.
    assert (np.abs(one - other) <= ERRORS[kind] * size + 64 * TINY).all(), (one, other)


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


@given(
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


@given(row=gradients(-20, 20, (4,)), col=gradients(-20, 20, (5,)), x=gradients(-30, 30, (4, 5)))
def test_factors_keep_means_and_products(row: np.ndarray, col: np.ndarray, x: np.ndarray) -> None:
    product = np.abs(np.outer(row, col))
    _, decoded = factors()(product)
    np.testing.assert_allclose(decoded, product, rtol=16 * EPS, atol=4 * TINY)
    (rows, cols), decoded = factors()(np.abs(x))
    np.testing.assert_allclose(np.mean(decoded, 1), rows, rtol=32 * EPS, atol=1e-30)
    np.testing.assert_allclose(np.mean(decoded, 0), cols, rtol=32 * EPS, atol=1e-30)
    assert (np.asarray(decoded) >= 0).all()


@given(drawn=cases())
def test_states_come_back_from_bytes(drawn: Drawn) -> None:
    serialization = pytest.importorskip('flax.serialization')
    form, _, numbers = drawn
    step = run(drawn)[-1]
    template, _ = starting(form)(numbers, step.gradient)
    stored = serialization.to_bytes(step.after)
    chex.assert_trees_all_equal(serialization.from_bytes(template, stored), step.after)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(step.after)), step.after)


# --- What moves to other frameworks --------------------------------------------------------------


class Elsewhere(NamedTuple):
    """Where a state may go: our optimizer, and the way there and back.

    Attributes:
      send: To theirs, of a state, our optimizer and the parameters.
      bring: To ours, of theirs, our optimizer and the parameters.
    """

    tx: optax.GradientTransformation
    send: Callable[[Any, Any, Any], Any]
    bring: Callable[[Any, Any, Any], Any]
    dtype: str = 'float32'


LINEAR = interchange.torch.linear('fc', 'fc')
DENSE = interchange.keras.dense('fc', 'fc')
SIZES = {'kernel': (2, 3), 'bias': (3,)}


def torch(momentum: float = 0.0, centered: bool = False, dtype: str = 'float32') -> Elsewhere:
    settings = {'lr': 0.1, 'alpha': 0.9, 'eps': 1e-8, 'weight_decay': 0, 'momentum': momentum}
    names = {'params': [0, 1], 'param_names': ['fc.weight', 'fc.bias']}
    groups = [settings | names | {'centered': centered, 'maximize': False}]
    return Elsewhere(
        dialects.torch(0.1, 0.9, momentum=momentum, centered=centered),
        lambda state, tx, params: interchange.to_torch(state, params, LINEAR, groups, tx=tx),
        lambda theirs, tx, params: interchange.from_torch(theirs, tx, params, LINEAR),
        dtype,
    )


def keras(**options: Any) -> Elsewhere:
    return Elsewhere(
        dialects.keras(0.1, **options),
        lambda state, tx, params: interchange.to_keras(
            state, params, DENSE, tx=tx, learning_rate=0.1
        ),
        lambda theirs, tx, params: interchange.from_keras(theirs, tx, params, DENSE),
    )


def tensorflow(**options: Any) -> Elsewhere:
    centered = options.get('centered', False)
    return Elsewhere(
        dialects.tensorflow(0.1, **options),
        lambda state, tx, params: interchange.to_tensorflow(state, params, DENSE, tx=tx),
        lambda theirs, tx, params: interchange.from_tensorflow(
            theirs, tx, params, DENSE, centered=centered
        ),
    )


def optax_(dtype: str = 'float32', **options: Any) -> Elsewhere:
    decay = 0.9 if options.get('bias_correction') else None
    theirs = optax.rmsprop(0.1, 0.9, **options)
    return Elsewhere(
        rmsprop_jax.rmsprop(0.1, 0.9, **options),
        lambda state, tx, params: interchange.to_optax(
            state, theirs, params, source=tx, decay=decay
        ),
        lambda moved, tx, params: interchange.from_optax(
            moved, tx, params, decay=decay, count=STEPS
        ),
        dtype,
    )


ELSEWHERE = {
    'torch': torch(),
    'torch-momentum': torch(0.5),
    'torch-centered': torch(0.5, centered=True),
    'torch-complex': torch(0.5, centered=True, dtype='complex64'),
    'keras': keras(),
    'keras-everything': keras(momentum=0.5, centered=True),
    'tensorflow': tensorflow(),
    'tensorflow-centered': tensorflow(momentum=0.5, centered=True),
    'optax': optax_(momentum=0.5),
    'optax-corrected': optax_(bias_correction=True, dtype='complex64'),
    'optax-centered': optax_(centered=True, bias_correction=True, momentum=0.5, nesterov=True),
}


# What has been measured of each optimizer.
KNOWN: dict[Any, Any] = {}


@functools.cache
def there(name: str) -> Callable[..., Any]:
    tx = ELSEWHERE[name].tx

    def last(g: Any) -> Any:
        return jax.lax.scan(
            lambda state, x: (tx.update(x, state)[1], None), tx.init(entry(g, 0)), g
        )[0]

    return jax.jit(last)


@pytest.mark.parametrize('name', ELSEWHERE)
@given(parts=st.tuples(*[alike(-60, 60, (STEPS, 9))] * 2))
def test_states_come_back_from_other_frameworks(name: str, parts: Any) -> None:
    tx, send, bring, dtype = ELSEWHERE[name]
    g = (parts[0] + 1j * parts[1] if dtype == 'complex64' else parts[0]).astype(jnp.dtype(dtype))
    tree = {'fc': {'kernel': g[:, :6].reshape(STEPS, 2, 3), 'bias': g[:, 6:]}}
    params = entry(tree, 0)
    state = there(name)(tree)
    with measured_once(KNOWN):
        theirs = send(state, tx, params)
    with warnings.catch_warnings(), measured_once(KNOWN):
        # Variances that are lost beside the square of a mean are found again as zero.
        warnings.simplefilter('ignore', interchange.LossyConversionWarning)
        back = bring(theirs, tx, params)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    names = ('nu', 'mu', 'trace')
    before, after = ({x: optax.tree.get(tree, x) for x in names} for tree in (state, back))
    chex.assert_trees_all_equal(after, before)
    counts = [optax.tree.get_all_with_path(tree, 'count') for tree in (state, back)]
    chex.assert_trees_all_equal(*counts)
    weight = optax.tree.get(state, 'weight')
    if weight is not None:
        # Optax computes it anew.
        np.testing.assert_allclose(optax.tree.get(back, 'weight'), weight, rtol=4 * EPS)
    if before['mu'] is None:
        return

    def same(var: Any, found: Any, mu: Any) -> None:
        """Theirs is the sum of a variance and a squared mean, rounded once."""
        whole = np.asarray(var, float) + np.abs(np.asarray(mu, complex)) ** 2 / (weight or 1.0)
        assert (np.abs(np.asarray(found, float) - var) <= EPS * whole + TINY).all()

    jax.tree.map(same, optax.tree.get(state, 'var'), optax.tree.get(back, 'var'), before['mu'])
