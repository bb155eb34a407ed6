"""Runs recorded from the frameworks are identified, and nothing false is ever said with certainty.

`identify_data/` holds the runs, with the hyperparameters that were drawn for them, and the scripts
that made them.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from identify_data import others
from identify_data.others import NAMES, Other, other

from rmsprop_jax import dialects, rmsprop
from rmsprop_jax.identify import Facts, Identification, Trace, identify_dialect
from rmsprop_jax.identify.__main__ import main
from rmsprop_jax.identify._recording import lay_out, read_trace

DATA = Path(__file__).parent / 'identify_data'
FRAMEWORKS = sorted(path.stem for path in DATA.glob('*.npz'))
DROP = np.where(np.arange(12) < 6, 0.02, 0.004)

# --- What the frameworks did ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A run of a framework: its trace, what was drawn for it, and what is therefore true of it."""

    name: str
    arrays: dict[str, np.ndarray]
    drawn: dict[str, Any]

    @property
    def told(self) -> dict[str, Any]:
        """The hyperparameters that the user says; weight decay is at least asked for."""
        told = {name: self.drawn[name] for name in self.drawn['told']}
        return {'weight_decay': 'fit', **told} if self.drawn['weight_decay'] else told

    @property
    def truth(self) -> Facts:
        drawn, framework = self.drawn, self.drawn['framework']
        momentum = drawn['momentum'] > 0
        optax = framework == 'optax'
        inside = {
            'torch': False,
            'keras_legacy': momentum,
            'optax': drawn['eps_inside'],
        }.get(framework, True)
        first = {'torch': False, 'stable_baselines3': False, 'timm': drawn['rate_first']}
        place = 'before momentum' if first.get(framework, True) else 'after momentum'
        ball = 'Nesterov' if optax and drawn['nesterov'] else 'heavy ball'
        one = framework in ('tensorflow', 'timm', 'stable_baselines3')
        one |= optax and drawn['from_one'] and not drawn['corrected']
        decay = 'decoupled' if drawn['decoupled'] else 'coupled'
        return Facts(
            epsilon='inside the root' if inside else 'outside the root',
            start='one' if one else 'zero',
            bias_correction='yes' if optax and drawn['corrected'] else 'no',
            centered='yes' if drawn['centered'] else 'no',
            momentum=ball if momentum else 'none',
            learning_rate=place if momentum else 'no momentum',
            weight_decay=decay if drawn['weight_decay'] else 'none',
        )

    @property
    def distinguishable(self) -> set[str]:
        """The facts that a run of this length shows."""
        facts = {'start', 'bias_correction', 'centered', 'momentum', 'weight_decay', 'epsilon'}
        drawn = self.drawn
        if drawn['eps'] < 1e-5:
            facts.discard('epsilon')
        if self.truth.start == 'one' and drawn['decay'] > 0.95:
            # In 20 steps the accumulator hardly leaves its start: what it is made of hardly shows.
            facts -= {'epsilon', 'centered'}
        if drawn['momentum'] and drawn['schedule'] != 'constant':
            # A rate that shrinks by one factor looks like another momentum.
            known = drawn['schedule'] != 'geometric' or 'momentum' in drawn['told']
            facts |= {'learning_rate'} if known else set()
        if not drawn['weight_decay']:
            facts.discard('weight_decay')
        return facts


@functools.cache
def recorded(framework: str) -> list[Recorded]:
    with np.load(DATA / f'{framework}.npz', allow_pickle=False) as archive:
        files = {name: archive[name] for name in archive.files}
    runs = []
    for number in sorted({int(name.split('/')[0]) for name in files}):
        start = f'{number}/'
        arrays = {k.removeprefix(start): v for k, v in files.items() if k.startswith(start)}
        drawn = json.loads(str(arrays.pop('truth')))
        runs.append(Recorded(f'{framework}/{number}', arrays, drawn))
    return runs


def tally(runs: list[Recorded]) -> Counter[str]:
    """Counts what is said of the distinguishable facts; fails where anything said is false."""
    counts: Counter[str] = Counter()
    for run in runs:
        found, truth = identify_dialect(run.arrays, **run.told), dataclasses.asdict(run.truth)
        assert not found.problem, (run.name, found.problem)
        for name, fact in found.facts.items():
            assert truth[name] in fact.possible, (run.name, name, str(found))
            assert fact.value in (None, truth[name]), (run.name, name, str(found))
            if name in run.distinguishable and fact.status != 'given':
                counts['open' if fact.value is None else 'right'] += 1
        assert run.drawn['framework'] in found.dialects, (run.name, found.dialects)
        [true] = [c for c in found.candidates if c.facts == run.truth]
        assert true.error < 2, (run.name, true.error)
    return counts


def few(framework: str) -> list[Recorded]:
    """Some runs of at most 16 steps, which share their compiled programs."""
    return [run for run in recorded(framework) if len(run.arrays['learning_rate']) <= 16][:2]


@pytest.mark.parametrize(
    'framework',
    [
        pytest.param(name, marks=() if name == 'torch' else pytest.mark.extended)
        for name in FRAMEWORKS
    ],
)
def test_recorded_runs_are_identified(framework: str):
    counts = tally(few(framework))
    assert counts['right'] >= 8
    assert not counts['open'], counts


@pytest.mark.slow
def test_all_recorded_runs_are_identified():
    runs = [run for framework in FRAMEWORKS for run in recorded(framework)]
    assert len(runs) >= 60
    counts = tally(runs)
    assert counts['right'] >= 0.95 * counts.total(), counts


@pytest.mark.slow
@pytest.mark.parametrize('framework', FRAMEWORKS)
@pytest.mark.parametrize('what', ['warm', 'clipped', 'rate'])
def test_runs_that_are_not_what_they_seem_mislead_nobody(framework: str, what: str):
    """Begun late, with gradients clipped behind the recorder's back, or with wrong rates."""
    for run in recorded(framework)[:2]:
        arrays, shares = dict(run.arrays), np.random.default_rng(0).uniform(0.5, 1, 20)
        for name, array in arrays.items():
            if what == 'warm':
                arrays[name] = array[3:]
            elif what == 'clipped' and name.startswith('gradients'):
                scale = shares[: len(array)].reshape(-1, *[1] * (array.ndim - 1))
                arrays[name] = array.astype(float) * scale
            elif what == 'rate' and name == 'learning_rate':
                arrays[name] = array * 1.001
        found = identify_dialect(arrays, **run.told)
        truth = dataclasses.asdict(run.truth)
        for name, fact in found.facts.items():
            assert fact.value in (None, truth[name]), (run.name, name, str(found))


# --- What other optimizers did -------------------------------------------------------------------

# The drawn runs of the slow test, some 4 s of a busy processor each: 1000 take an hour.
OTHERS = int(os.environ.get('IDENTIFY_OTHERS', '24'))


def misleads(run: Other) -> str:
    """What `identify_dialect` says with certainty of a run and should not; empty if nothing.

    Of RMSProp whose gradients were changed after they were recorded the truth may be said.
    """
    found = identify_dialect(run.trace, **run.told)
    said = [
        f'{name}: {fact.value}'
        for name, fact in found.facts.items()
        if fact.value not in (None, run.truth.get(name)) and not found.problem
    ]
    return f'{run.name} is determined to be {said}\n{found}' if said else ''


def quick(name: str) -> Other:
    """A run that is short and has no weight decay to be fitted, so that it is judged fast."""
    runs = map(other, range(NAMES.index(name), 1000, len(NAMES)))
    short = (run for run in runs if len(run.trace['gradients']) <= 16)
    return next(run for run in short if 'weight_decay' not in run.told)


# The others take long, or are much like one of these.
QUICK = sorted(set(NAMES) - {'sgd', 'momentum', 'rate_first', 'adamw', 'clipped_by_norm'})


@pytest.mark.extended
@pytest.mark.parametrize('name', QUICK)
def test_other_optimizers_are_not_determined_to_be_rmsprop(name: str):
    assert not misleads(quick(name))


@pytest.mark.slow
def test_many_other_optimizers_are_not_determined_to_be_rmsprop():
    wrong = list(filter(None, map(misleads, map(other, range(OTHERS)))))
    assert not wrong, '\n'.join(wrong)


@pytest.mark.extended
@pytest.mark.parametrize(
    ('dtype', 'momentum', 'constant'),
    [
        (np.float32, 0.0, True),
        (np.float32, 0.9, False),
        (np.float64, 0.0, False),
        (np.float64, 0.9, True),
    ],
)
def test_sgd_is_called_sgd(dtype: Any, momentum: float, constant: bool):
    rng = np.random.default_rng(3)
    rates = 0.01 * (np.ones(10) if constant else rng.uniform(0.3, 1, 10))
    start, gradients = rng.normal(size=24).astype(dtype), rng.normal(size=(10, 24)).astype(dtype)
    seen = others.trajectory(others.sgd(momentum=momentum), start, gradients, rates)
    found = identify_dialect({'params': seen, 'gradients': gradients, 'learning_rate': rates})
    assert found.outcome == 'degenerate'
    assert found.dialects == found.survivors == ()
    assert {fact.value for fact in found.facts.values()} == {None}
    best = found.rivals[0]
    assert best.facts.rule == 'SGD'
    assert best.facts.momentum == ('heavy ball' if momentum else 'none')
    assert (best.rate, best.momentum) == pytest.approx((1.0, momentum), rel=1e-5)
    assert found.verdict.startswith('Nothing is determined: the run is SGD (')


OPTAX: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    'sgd': (lambda: others.sgd(momentum=0.9), lambda lr: optax.sgd(lr, 0.9)),
    'nesterov': (
        lambda: others.sgd(momentum=0.9, nesterov=True),
        lambda lr: optax.sgd(lr, 0.9, nesterov=True),
    ),
    'adam': (lambda: others.adam(eps=0.01), lambda lr: optax.adam(lr, eps=0.01)),
    'adamw': (
        lambda: others.decaying(others.adam(), 0.1, decoupled=True),
        lambda lr: optax.adamw(lr, weight_decay=0.1),
    ),
    'adagrad': (others.adagrad, optax.adagrad),
    'adadelta': (others.adadelta, optax.adadelta),
    'sign_sgd': (others.sign_sgd, optax.sign_sgd),
    'lion': (others.lion, lambda lr: optax.lion(lr, weight_decay=0.0)),
    'rmsprop': (
        lambda: others.rmsprop(momentum=0.5),
        lambda lr: dialects.torch(lr, 0.9, momentum=0.5),
    ),
    'clipped_by_norm': (
        lambda: others.clipped_by_norm(others.sgd(), 1.0),
        lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)),
    ),
    'clipped_by_value': (
        lambda: others.clipped_by_value(others.sgd(), 0.1),
        lambda lr: optax.chain(optax.clip(0.1), optax.sgd(lr)),
    ),
}


@pytest.mark.parametrize('name', OPTAX)
def test_the_other_optimizers_are_those_of_optax(name: str):
    ours, make = OPTAX[name]
    with jax.enable_x64(True):
        trace = run(make, dtype=np.float64)
    seen = others.trajectory(ours(), trace['params'][0], trace['gradients'], DROP)
    np.testing.assert_allclose(seen, trace['params'], rtol=1e-12, atol=1e-14)


def test_rprop_is_that_of_optax():
    """Of its state: Optax 0.2.8 returns each update one step late."""
    ours, tx = others.rprop(size=0.01), optax.rprop(0.01)
    gradients = run(torch)['gradients']
    state: Any = tx.init(jnp.asarray(gradients[0]))
    for g in gradients:
        _, state = tx.update(jnp.asarray(g), state)
        np.testing.assert_allclose(ours(g, g), state[0].prev_updates, rtol=1e-6)


# --- What our dialects did -----------------------------------------------------------------------


def run(
    make: Callable[[Any], Any],
    rates: Any = DROP,
    dtype: Any = np.float32,
    scale: float = 1.0,
    elements: int = 24,
) -> dict[str, Any]:
    """Steps an optimizer, made from its schedule, on gradients of different sizes."""
    rng = np.random.default_rng(7)
    rates = np.asarray(rates)
    sizes = scale * np.logspace(-2, 0, elements)
    gradients = (rng.normal(size=(len(rates), elements)) * sizes).astype(dtype)
    schedule = jnp.asarray(rates)
    tx = make(lambda step: schedule[step])
    params = jnp.asarray(0.3 * rng.normal(size=elements), dtype)
    state, seen = tx.init(params), [np.asarray(params)]
    update = jax.jit(tx.update)
    for g in gradients:
        updates, state = update(jnp.asarray(g), state, params)
        params = (params + updates).astype(dtype)
        seen.append(np.asarray(params))
    return {'params': np.stack(seen), 'gradients': gradients, 'learning_rate': rates}


def torch(lr: Any, **options: Any) -> Any:
    return dialects.torch(lr, **{'alpha': 0.9, 'eps': 0.01, 'momentum': 0.7, **options})


OURS: dict[str, Callable[[Any], Any]] = {
    'torch': torch,
    'keras': lambda lr: dialects.keras(lr, 0.9, 0.7, 0.01, weight_decay=0.1),
    'keras_legacy': lambda lr: dialects.keras_legacy(lr, 0.9, 0.0, 0.01),
    'tf_keras': lambda lr: dialects.tf_keras(lr, 0.9, 0.7, 0.01, weight_decay=0.1),
    'tensorflow': lambda lr: dialects.tensorflow(lr, 0.8, 0.5, 0.01, centered=True),
    'timm': lambda lr: dialects.timm(
        lr, 0.8, 0.01, 0.1, 0.7, decoupled_decay=True, lr_in_momentum=False
    ),
    'stable_baselines3': lambda lr: dialects.stable_baselines3(lr, 0.8, 0.01, 0.1, 0.7),
    'optax': lambda lr: rmsprop(lr, 0.9, 0.01, momentum=0.7, nesterov=True, bias_correction=True),
    'graves': lambda lr: dialects.graves(lr, 0.9, 0.7, 0.01),
}


@pytest.mark.extended
@pytest.mark.parametrize('name', OURS)
def test_our_dialects_are_identified(name: str):
    decaying = name in ('keras', 'tf_keras', 'timm', 'stable_baselines3')
    asked = decaying or name == 'torch'
    found = identify_dialect(run(OURS[name]), **({'weight_decay': 'fit'} if asked else {}))
    assert name in found.dialects, str(found)
    unsure = {n for n, fact in found.facts.items() if fact.status != 'determined'}
    # No weight decay at all cannot be told from a very small one.
    assert unsure <= {
        *(() if decaying else ('weight_decay',)),
        *(('learning_rate',) if name == 'keras_legacy' else ()),
    }, str(found)
    best = found.candidates[0]
    assert best.eps == pytest.approx(0.01, rel=0.01)
    assert best.weight_decay == pytest.approx(0.1 if decaying else 0.0, rel=0.01, abs=1e-4)


@pytest.mark.extended
@pytest.mark.parametrize('name', ['keras', 'tf_keras'])
def test_one_rule_under_two_names_is_settled(name: str):
    """With a constant rate its side of the momentum stays open, and yet one rule remains."""
    found = identify_dialect(run(OURS[name], np.full(20, 0.02)), weight_decay='fit')
    assert found.facts['learning_rate'].status == 'not determined'
    assert found.dialects == ('keras', 'tf_keras')
    assert found.outcome == 'settled'


@pytest.mark.extended
def test_hyperparameters_are_found_or_taken_as_given():
    trace = run(torch)
    fitted = identify_dialect(trace).candidates[0]
    values = (fitted.decay, fitted.eps, fitted.momentum, fitted.weight_decay)
    assert values == pytest.approx((0.9, 0.01, 0.7, 0), rel=1e-3)
    given = identify_dialect({**trace, 'decay': 0.9, 'momentum': 0.7}, eps=0.01).candidates[0]
    assert (given.decay, given.eps, given.momentum) == pytest.approx((0.9, 0.01, 0.7), rel=1e-6)
    assert identify_dialect({**trace, 'decay': 0.99}).problem
    assert not identify_dialect({**trace, 'decay': 0.99}, decay=0.9).problem


@pytest.mark.extended
def test_weight_decay_is_only_considered_where_it_is_asked_for():
    trace = run(lambda lr: torch(lr, weight_decay=0.1))
    assert 'give weight_decay' in identify_dialect(trace).problem
    for asked in (0.1, 'fit'):
        found = identify_dialect(trace, weight_decay=asked)  # pyright: ignore[reportArgumentType]
        assert found.facts['weight_decay'].value == 'coupled'
        assert found.dialects == ('torch',)


# --- What cannot be told is said -----------------------------------------------------------------


def undetermined(found: Identification) -> set[str]:
    assert not found.problem
    return {name for name, fact in found.facts.items() if fact.value is None}


def test_a_constant_learning_rate_does_not_show_its_place():
    found = identify_dialect(run(torch, np.full(12, 0.01)))
    assert undetermined(found) == {'learning_rate'}
    assert found.facts['learning_rate'].reason == 'the learning rate is constant'
    assert 'Not determined: learning rate, since the learning rate is constant.' in str(found)


@pytest.mark.extended
def test_a_geometric_learning_rate_needs_the_momentum():
    trace = run(torch, 0.02 * 0.8 ** np.arange(12))
    found = identify_dialect(trace)
    assert undetermined(found) == {'learning_rate'}
    assert 'looks like another momentum' in found.facts['learning_rate'].reason
    assert identify_dialect(trace, momentum=0.7).dialects == ('torch',)


def test_a_negligible_epsilon_does_not_show_its_place():
    found = identify_dialect(run(lambda lr: torch(lr, eps=1e-12)))
    assert undetermined(found) == {'epsilon'}
    assert 'too small' in found.facts['epsilon'].reason


@pytest.mark.extended
def test_without_momentum_the_learning_rate_has_no_place():
    found = identify_dialect(run(lambda lr: torch(lr, momentum=0)))
    assert undetermined(found) == {'learning_rate'}
    assert found.facts['momentum'].value == 'none'
    assert found.facts['learning_rate'].reason == 'there is no momentum'
    told = identify_dialect(run(lambda lr: torch(lr, momentum=0)), momentum=0.0)
    assert told.facts['momentum'].status == 'given'


@pytest.mark.extended
def test_few_steps_leave_much_open_and_nothing_false():
    found = identify_dialect(run(torch, DROP[-6:-4]))
    assert 'learning_rate' in undetermined(found)
    truth = {
        'epsilon': 'outside the root',
        'start': 'zero',
        'bias_correction': 'no',
        'centered': 'no',
        'momentum': 'heavy ball',
        'weight_decay': 'none',
    }
    for name, value in truth.items():
        assert found.facts[name].value in (None, value), str(found)


@pytest.mark.extended
@pytest.mark.parametrize('make', [torch, optax.adam, optax.adagrad])
def test_one_step_may_be_that_of_another_optimizer(make: Callable[[Any], Any]):
    found = identify_dialect(run(make, DROP[:1]))
    assert found.problem.startswith('there is only one step')
    assert found.dialects == ()
    assert {fact.value for fact in found.facts.values()} == {None}


@pytest.mark.extended
def test_a_decay_at_the_end_of_its_range_determines_nothing():
    trace = run(lambda lr: rmsprop(lr, 1 - 1e-7, 1e-3, bias_correction=True))
    found = identify_dialect(trace)
    assert found.outcome == 'degenerate'
    assert 'with a decay of 0.999999, the end of the range' in found.problem
    # A decay that the caller says is not one that ran away.
    assert identify_dialect(trace, decay=1 - 1e-7).dialects == ('optax',)


def test_one_number_tells_nothing():
    trace = run(torch, DROP[:2], elements=1)
    found = identify_dialect(trace)
    assert 'so few numbers' in found.problem
    assert {fact.status for fact in found.facts.values()} == {'not determined'}
    assert found.dialects == found.survivors == ()


@pytest.mark.extended
def test_zero_gradients_tell_nothing():
    trace = run(torch, scale=0.0)
    assert identify_dialect(trace).problem == 'all gradients are zero'
    assert identify_dialect(run(torch), learning_rate=0.0).problem == 'the learning rate is zero'


@pytest.mark.extended
def test_a_run_recorded_from_its_middle_is_recognised():
    trace = {name: array[4:] for name, array in run(torch).items()}
    found = identify_dialect(trace)
    assert 'no candidate explains the first step' in found.problem
    assert all(fact.value is None for fact in found.facts.values())
    assert f'\nNothing is determined: {found.problem}.\n' in str(found)
    nearest = f'The nearest candidate misses by {found.candidates[0].error:.2g} times the rounding'
    assert str(found).splitlines()[-1].startswith(nearest)
    assert found.outcome == 'unexplained'


@pytest.mark.extended
def test_a_run_that_goes_astray_later_is_recognised():
    trace = run(torch)
    trace['params'][8:] += np.float32(0.01)
    assert 'though some explain the first' in identify_dialect(trace).problem


@pytest.mark.extended
def test_noise_is_tolerated_where_the_caller_says_how_much():
    trace = run(torch)
    noise = 1 + 1e-3 * np.random.default_rng(0).uniform(-1, 1, trace['gradients'].shape)
    noisy = {**trace, 'gradients': (trace['gradients'] * noise).astype(np.float32)}
    assert identify_dialect(noisy).outcome == 'unexplained'
    found = identify_dialect(noisy, tolerance=1e-3)
    assert found.dialects == ('torch',)
    assert 'float32 rounding with a tolerance of 0.001 explains them' in str(found)
    assert undetermined(found) <= {'centered'}
    best = found.candidates[0]
    assert (best.decay, best.eps, best.momentum) == pytest.approx((0.9, 0.01, 0.7), rel=0.01)


# --- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize('stored', [np.float32, np.float64])
def test_a_float32_run_is_judged_as_one_however_it_is_stored(stored: Any):
    trace = run(torch)
    found = identify_dialect({**trace, 'params': trace['params'].astype(stored)})
    assert found.precision == 'float32'
    assert found.dialects == ('torch',)


@pytest.mark.extended
def test_a_bfloat16_run_is_judged_as_one():
    found = identify_dialect(run(torch, DROP * 10, dtype=jnp.bfloat16))
    assert found.precision == 'bfloat16'
    assert not found.problem
    for name, value in {'start': 'zero', 'centered': 'no', 'epsilon': 'outside the root'}.items():
        assert found.facts[name].value in (None, value)


@pytest.mark.extended
def test_results_do_not_depend_on_the_configuration():
    trace = run(torch)
    expected = identify_dialect(trace)
    # Both in one test, which compiles for strict promotion once.
    for x64 in (False, True):
        with jax.enable_x64(x64), jax.numpy_dtype_promotion('strict'), jax.debug_nans(True):
            assert identify_dialect(trace) == expected
            assert jax.config.jax_enable_x64 == x64


def test_large_leaves_are_thinned_out():
    trace = run(torch, elements=5000)
    steps = lay_out(read_trace(trace), trace['learning_rate'])[0].reduced()
    assert steps.gradients.shape == (12, 128)
    sizes, kept = (abs(g).max(axis=0) for g in (trace['gradients'], steps.gradients))
    assert (kept.min(), kept.max()) == (sizes.min(), sizes.max())
    assert np.median(kept) == pytest.approx(np.median(sizes), rel=0.1)


@pytest.mark.slow
def test_large_leaves_are_identified():
    found = identify_dialect(run(torch, elements=5000))
    assert found.dialects == ('torch',)


# --- What is no trace ----------------------------------------------------------------------------


def good() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        'params': {'w': rng.normal(size=(4, 3)), 'b': rng.normal(size=(4, 2))},
        'gradients': {'w': rng.normal(size=(3, 3)), 'b': rng.normal(size=(3, 2))},
        'learning_rate': 0.1,
    }


def spoilt(**changes: Any) -> dict[str, Any]:
    return {**good(), **changes}


NAN = np.array([[0.0, 1.0], [np.nan, 0.0], [0.0, 0.0]])
BAD: dict[str, tuple[Any, str]] = {
    'nothing': ({}, 'the trace has no params'),
    'no gradients': ({'params': np.ones((2, 1))}, 'the trace has no gradients'),
    'unknown entry': (spoilt(grads=1), "no entry 'grads'"),
    'no rate': (spoilt(learning_rate=None), 'no learning_rate'),
    'rates of another length': (spoilt(learning_rate=[1, 2]), 'there are 3 steps'),
    'rates of text': (spoilt(learning_rate='fast'), 'a number or one per step'),
    'rates of NaN': (spoilt(learning_rate=np.nan), 'NaN'),
    'other leaves': (spoilt(gradients={'w': np.ones((3, 3))}), r"\['b'\] is in one only"),
    'no step more': (
        spoilt(params={'w': np.ones((3, 3)), 'b': np.ones((4, 2))}),
        r"params\['w'\] \(3, 3\)",
    ),
    'other shape': (
        spoilt(gradients={'w': np.ones((3, 4)), 'b': np.ones((3, 2))}),
        r"gradients\['w'\] has shape \(3, 4\)",
    ),
    'no steps': (
        {'params': np.ones((1, 2)), 'gradients': np.ones((0, 2)), 'learning_rate': 1},
        'no steps',
    ),
    'NaN': (
        spoilt(gradients={'w': np.ones((3, 3)), 'b': NAN}),
        r"gradients\['b'\] holds NaN or infinity at row 1",
    ),
    'integers': (spoilt(gradients={'w': np.ones((3, 3), int), 'b': np.ones((3, 2))}), 'int64'),
    'complex': (
        {'params': np.ones((2, 2), complex), 'gradients': np.ones((1, 2), complex)},
        'real and imaginary parts',
    ),
    'scalars': ({'params': 1.0, 'gradients': 1.0}, 'one row per step'),
    'decay of one': (spoilt(decay=1.0), r'decay must be in \[0, 1\)'),
    'eps of text': (spoilt(eps='small'), 'eps must be a number'),
}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_trace_is_refused(name: str):
    trace, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        identify_dialect(trace)


@pytest.mark.extended
def test_a_trace_may_be_a_record():
    assert identify_dialect(Trace(**run(torch), decay=0.9)).dialects == ('torch',)


# --- Files and the command line ------------------------------------------------------------------


def saved(path: pathlib.Path, trace: dict[str, Any], **more: Any) -> str:
    split = {f'{name}/w': trace[name] for name in ('params', 'gradients')}
    np.savez(path, **split, learning_rate=trace['learning_rate'], **more)
    return str(path)


@pytest.mark.extended
def test_the_command_prints_table_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = saved(tmp_path / 'trace.npz', run(torch), decay=0.9)
    assert main([path]) == 0
    printed = capsys.readouterr().out
    assert printed == f'{identify_dialect(path)}\n'
    assert 'Dialects that do this: torch.' in printed
    options = ['--momentum', '0.7', '--eps=0.01', '--weight-decay', 'fit', '--tolerance', '1e-9']
    assert main([path, '--json', *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['tolerance'] == 1e-9
    assert report['dialects'] == ['torch']
    assert report['facts']['learning_rate']['value'] == 'after momentum'
    assert report['outcome'] == 'settled'
    assert main([path, '--learning-rate', '0.5']) == 3
    assert 'Nothing is determined' in capsys.readouterr().out


@pytest.mark.extended
def test_the_command_has_an_exit_code_for_each_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    constant = saved(tmp_path / 'constant.npz', run(torch, np.full(12, 0.01)))
    rates = np.full(12, 0.01)
    plain = saved(tmp_path / 'plain.npz', run(lambda _: optax.sgd(0.01), rates))
    assert identify_dialect(constant).outcome == 'several'
    assert main([constant]) == 1
    assert main([plain]) == 4
    assert 'SGD' in capsys.readouterr().out


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ('unpickled',))


@pytest.mark.parametrize(
    'kind', ['missing', 'text', 'npy', 'truncated', 'pickle', 'empty', 'option', 'number']
)
def test_the_command_refuses_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, options = tmp_path / 'trace.npz', []
    if kind == 'text':
        path.write_text('parameters')
    elif kind == 'npy':
        with path.open('wb') as file:
            np.save(file, np.ones(3))
    elif kind == 'truncated':
        saved(path, run(torch))
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == 'pickle':
        saved(path, run(torch), decay=np.array(Bomb(), dtype=object))
    elif kind == 'empty':
        np.savez(path)
    elif kind == 'option':
        options = ['--colour']
    elif kind == 'number':
        saved(path, run(torch))
        options = ['--decay', '2']
    with pytest.raises(SystemExit) as stopped:
        main([str(path), *options])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ''
    assert output.err.startswith('python -m rmsprop_jax.identify: error: ')
    assert output.err.count('\n') == 1


@pytest.mark.extended
def test_the_module_runs_without_warnings_and_explains_itself():
    command = [sys.executable, '-W', 'error', '-m', 'rmsprop_jax.identify', '--help']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ''
    for option in (
        'decay',
        'eps',
        'momentum',
        'weight-decay',
        'learning-rate',
        'tolerance',
        'json',
    ):
        assert f'--{option}' in done.stdout
    assert 'Exit codes: 0, ' in done.stdout
