"""Runs that move between frameworks in the middle end where they would have ended without."""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from interchange_data import ours, problem, record_float64

import rmsprop_jax
from rmsprop_jax import dialects, interchange
from rmsprop_jax._reset import reset

HALF, END = problem.HANDOVER, problem.END
EXACT = 1e-10


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def assert_same(found: Any, wanted: Any) -> None:
    """Equal to the last bit, with the same dtypes and keys."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    else:
        np.testing.assert_array_equal(found, wanted)
        assert np.asarray(found).dtype == np.asarray(wanted).dtype


# Frameworks: what was recorded from them goes on here, and goes back unchanged.


RECORDED = [
    *(('torch', case) for case in ('net', 'complex')),
    *(('keras', case) for case in problem.KERAS),
    *(('tensorflow', case) for case in problem.TENSORFLOW),
]


def _recorded(framework: str, case: str) -> tuple[dict[str, Any], ours.Port]:
    run = problem.read(problem.FOLDER / f'{framework}.npz', case)
    return run, ours.port(framework, case, run['state'])


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('framework', 'case'), RECORDED)
def test_a_run_of_theirs_goes_on_here_as_if_it_had_stayed(framework: str, case: str):
    run, port = _recorded(framework, case)
    assert ours.worst(port.goes_on_here(run), run['end']) < EXACT


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('framework', 'case'), RECORDED)
def test_what_we_hand_over_is_what_they_would_have(framework: str, case: str):
    """`check_live` loads it into the framework and trains on."""
    run, port = _recorded(framework, case)
    start = problem.net_params() if case == 'net' else problem.params(case == 'complex')
    found = port.starts_here(start)
    assert ours.worst(found['params'], run['params']) < EXACT
    state, wanted = found['state'], run['state']
    if framework != 'torch':
        assert _near(state, wanted)
    else:
        assert state['param_groups'] == wanted['param_groups']
        assert set(state['state']) == set(wanted['state'])
        assert all(_near(state['state'][i], wanted['state'][i]) for i in wanted['state'])


def _near(found: Any, wanted: Any) -> bool:
    # What is exactly zero, a gradient accumulator, has no relative deviation.
    zero = {name for name, array in wanted.items() if not np.any(array)}
    assert not any(np.any(found[name]) for name in zero)
    kept = {name: array for name, array in found.items() if name not in zero}
    return ours.worst(kept, {k: v for k, v in wanted.items() if k not in zero}) < EXACT


@pytest.mark.usefixtures('x64')
def test_complex_pytorch_moments_are_pairs_of_reals_here():
    run, port = _recorded('torch', 'complex')
    params, tx = port.params_from(run['params']), port.make(1.0)
    state = port.bring(run['state'], tx, params)
    assert optax.tree.get(state, 'var')['layer']['bias'].shape == (2, 2)


def _is_second_moment(path: tuple[Any, ...]) -> bool:
    last = jax.tree_util.keystr(path[-1:], simple=True)
    return last == 'square_avg' or last.endswith(('velocity', 'RMSProp'))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('framework', 'case'), RECORDED)
def test_a_round_trip_changes_nothing(framework: str, case: str):
    run, port = _recorded(framework, case)
    wanted, found = run['state'], port.visit(run)
    if framework == 'torch' or case == 'centered':
        # A centered second moment is taken apart and put together again: a unit in the last place.
        def settle(path: tuple[Any, ...], a: Any, b: Any) -> Any:
            if not _is_second_moment(path):
                return b
            np.testing.assert_array_max_ulp(np.asarray(a).real, np.asarray(b).real, maxulp=1)
            np.testing.assert_array_max_ulp(np.asarray(a).imag, np.asarray(b).imag, maxulp=1)
            return a

        found = jax.tree_util.tree_map_with_path(settle, wanted, found)
    assert_same(found, wanted)


def test_float32_round_trips_and_keeps_their_dtype():
    weights = np.linspace(0.1, 3.0, 6, dtype=np.float32).reshape(3, 2)
    entry = {'step': np.array(3, np.float32), 'square_avg': weights, 'momentum_buffer': -weights}
    theirs = {'state': {0: entry}, 'param_groups': [_group([0], momentum=0.5)]}
    params, pairs = {'fc': {'kernel': jnp.zeros((2, 3))}}, _fc(bias=False)
    tx = interchange.torch_optimizer(theirs, params, pairs, names=['fc.weight'])
    state = interchange.from_torch(theirs, tx, params, pairs, names=['fc.weight'])
    assert optax.tree.get(state, 'nu')['fc']['kernel'].dtype == jnp.float32
    found = interchange.to_torch(
        state, params, pairs, theirs['param_groups'], names=['fc.weight'], tx=tx
    )
    assert_same(found, theirs)


FIRST_STEPS = {
    'torch': dialects.torch,
    'timm': dialects.timm,
    'stable_baselines3': dialects.stable_baselines3,
    'keras': dialects.keras,
    'keras with a schedule': dialects.keras,
    # Of TensorFlow 2.11 and newer.
    'tf_keras': dialects.tf_keras,
    'tf_keras with a schedule': dialects.tf_keras,
    'keras_legacy': dialects.keras_legacy,
    'tensorflow': dialects.tensorflow,
}


@pytest.mark.usefixtures('x64')
def test_how_near_a_first_step_in_float64_comes():
    """PyTorch computes with the numbers it is given; Keras and TensorFlow round them to float32."""
    there = {
        name: steps
        for path in problem.FOLDER.glob('float64_*.json')
        for name, steps in json.loads(path.read_text()).items()
    }
    assert set(there) == set(FIRST_STEPS)
    p, g = jnp.array(record_float64.PARAMS), jnp.array(record_float64.GRADIENTS)
    numbers = (record_float64.RATE, record_float64.DECAY)
    for name, dialect in FIRST_STEPS.items():
        of_torch = name in ('torch', 'timm', 'stable_baselines3')
        eps = {'eps' if of_torch else 'epsilon': record_float64.EPS}
        tx = dialect(*numbers, **eps)
        apart = np.abs(tx.update(g, tx.init(p), p)[0] / np.array(there[name]) - 1).max()
        low, high = (0.0, 1e-15) if of_torch else (1e-8, 2e-7)
        assert low <= apart <= high, name


# Optax: live, both ways.


def _schedule(count: Any) -> Any:
    return problem.RATE * jnp.where(count < HALF, 1.0, problem.DROP)


OPTAX_CASES = [
    {'centered': centered, 'bias_correction': corrected, **more}
    for centered in (False, True)
    for corrected in (False, True)
    for more in ({}, {'momentum': 0.75, 'nesterov': True, 'initial_scale': 0.5})
]


@pytest.mark.extended
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('is_complex', [False, True])
@pytest.mark.parametrize('settings', OPTAX_CASES, ids=lambda s: '-'.join(map(str, s.values())))
def test_optax_trains_on_here_and_we_there(settings: dict[str, Any], is_complex: bool):
    theirs = optax.rmsprop(_schedule, 0.99, 1e-4, **settings)
    here = rmsprop_jax.rmsprop(_schedule, 0.99, 1e-4, **settings)
    # Of 0.99, so that the sum of weights is still well below 1 at the move.
    decay = 0.99 if settings['bias_correction'] else None
    start = ours.layer(problem.params(is_complex))
    params, state = ours.run(theirs, start, theirs.init(start), 0, HALF)
    end, _ = ours.run(theirs, params, state, HALF, END)

    moved = interchange.from_optax(state, here, params, decay=decay)
    assert jax.tree.structure(moved) == jax.tree.structure(here.init(params))
    params, _ = ours.run(here, params, moved, HALF, END)
    assert ours.worst(params['layer'], end['layer']) < EXACT

    params, state = ours.run(here, start, here.init(start), 0, HALF)
    moved = interchange.to_optax(state, theirs, params, source=here, decay=decay)
    assert jax.tree.structure(moved) == jax.tree.structure(theirs.init(params))
    params, _ = ours.run(theirs, params, moved, HALF, END)
    assert ours.worst(params['layer'], end['layer']) < EXACT


@pytest.mark.extended
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('settings', OPTAX_CASES, ids=lambda s: '-'.join(map(str, s.values())))
def test_optax_round_trips(settings: dict[str, Any]):
    theirs, params = optax.rmsprop(_schedule, **settings), ours.layer(problem.params())
    params, state = ours.run(theirs, params, theirs.init(params), 0, 20)
    here, decay = rmsprop_jax.rmsprop(_schedule, **settings), 0.9
    if not settings['bias_correction']:
        decay = None
    moved = interchange.from_optax(state, here, params, decay=decay)
    found = interchange.to_optax(moved, theirs, params, source=here, decay=decay)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        if settings['centered']:
            np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), maxulp=1)
        else:
            np.testing.assert_array_equal(a, b)


def test_optax_needs_a_count_and_a_decay_where_the_state_has_none():
    params = {'w': jnp.zeros(2)}
    theirs, here = optax.rmsprop(0.1), rmsprop_jax.rmsprop(0.1)
    with pytest.raises(interchange.InterchangeError, match='has no step count: pass count'):
        interchange.from_optax(theirs.init(params), here, params)
    state = interchange.from_optax(theirs.init(params), here, params, count=9)
    assert optax.tree.get(state, 'count') == 9

    theirs = optax.rmsprop(0.1, bias_correction=True)
    here = rmsprop_jax.rmsprop(0.1, bias_correction=True)
    with pytest.raises(interchange.InterchangeError, match='pass its decay'):
        interchange.from_optax(theirs.init(params), here, params)
    with pytest.raises(interchange.InterchangeError, match='pass its decay'):
        interchange.to_optax(here.init(params), theirs, params)


def test_optax_cannot_take_the_weights_of_another_or_of_a_changing_decay():
    params = {'w': jnp.ones(2)}
    here = rmsprop_jax.rmsprop(0.1, 0.99, bias_correction=True)
    _, state = here.update(params, here.init(params))
    theirs = optax.rmsprop(0.1, 0.9, bias_correction=True)
    with pytest.raises(interchange.InterchangeError, match=r'weights add up to 0\.01'):
        interchange.to_optax(state, theirs, params, decay=0.9)
    moved = interchange.to_optax(state, theirs, params, decay=0.99)
    assert optax.tree.get(moved, 'count') == 1


def test_a_corrected_state_and_an_uncorrected_transformation_do_not_go_together():
    params = {'w': jnp.ones(2)}
    for theirs, ours_corrected in ((True, False), (False, True)):
        state = optax.rmsprop(0.1, bias_correction=theirs).init(params)
        here = rmsprop_jax.rmsprop(0.1, bias_correction=ours_corrected)
        with pytest.raises(interchange.InterchangeError, match=r"'w': .* is bias-corrected"):
            interchange.from_optax(state, here, params, decay=0.9, count=3)


# Where a state can sit.


def _fc(*, bias: bool = True) -> tuple[interchange.Pair, ...]:
    return interchange.torch.linear('fc', 'fc', bias=bias)


def _group(numbers: list[int], **settings: Any) -> dict[str, Any]:
    defaults = {'lr': 0.1, 'alpha': 0.99, 'eps': 1e-8, 'weight_decay': 0, 'momentum': 0}
    return {**defaults, 'centered': False, 'maximize': False, **settings, 'params': numbers}


def _theirs(**more: Any) -> dict[str, Any]:
    """A PyTorch state of one linear layer with momentum, after seven steps."""
    kernel, bias = np.arange(6, dtype='f').reshape(3, 2), np.arange(3, dtype='f')
    entries = {
        i: {'step': np.float32(7), 'square_avg': x, 'momentum_buffer': x + 1, **more}
        for i, x in enumerate((kernel, bias))
    }
    group = _group([0, 1], momentum=0.9) | {'param_names': ['fc.weight', 'fc.bias']}
    return {'state': entries, 'param_groups': [group]}


def _params() -> Any:
    return {'fc': {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(3)}}


def _schedules() -> optax.GradientTransformation:
    # At the step at which the state is, the rate of the group.
    return dialects.torch(optax.piecewise_constant_schedule(0.1, {8: 0.5}), momentum=0.9)


WRAPPERS = {
    'plain': _schedules,
    'chain': lambda: optax.chain(optax.clip(1.0), optax.chain(_schedules())),
    'masked': lambda: optax.masked(_schedules(), True),
    'partition': lambda: optax.partition(
        {'a': _schedules(), 'b': dialects.torch(0.1, momentum=0.9)},
        {'fc': {'kernel': 'a', 'bias': 'b'}},
    ),
    'MultiSteps': lambda: optax.MultiSteps(_schedules(), 2).gradient_transformation(),
    'inject': lambda: rmsprop_jax.inject_hyperparams(dialects.torch)(0.1, momentum=0.9),
    'finite': lambda: optax.apply_if_finite(_schedules(), 3),
    'optax.trace': lambda: optax.chain(
        rmsprop_jax.scale_by_rms(0.99, eps_in_sqrt=False), optax.trace(0.9), optax.scale(-0.1)
    ),
}


@pytest.mark.extended
@pytest.mark.parametrize('name', WRAPPERS)
def test_the_state_is_found_inside_every_wrapper(name: str):
    tx, params = WRAPPERS[name](), _params()
    state = interchange.from_torch(_theirs(), tx, params, _fc())
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    named = jax.tree_util.tree_flatten_with_path(state)[0]
    counts = [
        int(leaf)
        for path, leaf in named
        if jax.tree_util.keystr(path[-1:], simple=True) in ('count', 'gradient_step')
    ]
    assert counts
    assert set(counts) == {7}
    found = interchange.to_torch(state, params, _fc(), _theirs()['param_groups'], tx=tx)
    assert_same(found['state'], _theirs()['state'])
    jax.jit(tx.update)(params, state, params)


def test_a_state_in_the_middle_of_an_accumulation_is_refused():
    tx, params = WRAPPERS['MultiSteps'](), _params()
    _, state = tx.update(params, tx.init(params), params)
    with pytest.raises(interchange.InterchangeError, match='mini_step is 1'):
        interchange.to_torch(state, params, _fc(), _theirs()['param_groups'], tx=tx)
    with pytest.raises(interchange.InterchangeError, match='in the middle of an accumulation'):
        interchange.from_keras(
            {'iteration': np.int64(7)}, dialects.keras(gradient_accumulation_steps=2), {}, []
        )


def test_flax_nnx_parameters_are_named_without_their_value():
    model = nnx.Dict(fc=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    tx = dialects.torch(0.1, momentum=0.9)
    state = interchange.from_torch(_theirs(), tx, params, _fc())
    found = interchange.to_torch(state, params, _fc(), _theirs()['param_groups'], tx=tx)
    assert_same(found['state'], _theirs()['state'])
    names = interchange.parameters_to(params, _fc())
    assert {name: x.shape for name, x in names.items()} == {'fc.weight': (3, 2), 'fc.bias': (3,)}


NNX_STATES = {
    'plain': lambda: dialects.torch(momentum=0.9),
    'MultiSteps': lambda: optax.MultiSteps(
        dialects.torch(momentum=0.9), 2
    ).gradient_transformation(),
    'inject': lambda: rmsprop_jax.inject_hyperparams(dialects.torch)(0.25, momentum=0.9),
}


@pytest.mark.extended
@pytest.mark.parametrize('name', NNX_STATES)
def test_the_state_of_an_nnx_optimizer_goes_out_as_the_plain_one_does(name: str):
    model = nnx.Dict(fc=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    params, tx = nnx.state(model, nnx.Param), NNX_STATES[name]()
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    for _ in range(4):
        optimizer.update(model, gradients)
        _, state = tx.update(gradients, state, params)
    groups = _theirs()['param_groups']
    del groups[0]['lr']
    found, wanted = (
        interchange.to_torch(x, params, _fc(), groups, tx=tx) for x in (optimizer.opt_state, state)
    )
    assert wanted['state'][0]['step'] == (2 if name == 'MultiSteps' else 4)
    assert_same(found['state'], wanted['state'])
    lost = _problems(lambda: interchange.to_torch(nnx.state(optimizer), params, _fc(), groups))
    assert 'pass what tx.init or tx.update returned, or opt_state of an nnx.Optimizer' in lost[0]


def test_the_calls_that_an_nnx_optimizer_accumulates_are_not_lost():
    """Eight calls at four a step: without the transformation nobody knows that they are not two."""
    model = nnx.Dict(fc=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    params, tx = nnx.state(model, nnx.Param), _accumulating(4)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(8):
        optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    pairs = [interchange.Pair(name, name) for name in ('fc/kernel', 'fc/bias')]
    lost = _problems(lambda: interchange.to_keras(optimizer.opt_state, params, pairs))
    assert 'the state accumulates gradients: pass tx' in lost[0]
    found = interchange.to_keras(optimizer.opt_state, params, pairs, tx=tx)
    assert found['iteration'] == 8


def test_the_rate_that_an_nnx_optimizer_holds_goes_to_keras():
    model = nnx.Dict(fc=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    tx = rmsprop_jax.inject_hyperparams(dialects.keras)(0.25)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    pairs = [interchange.Pair(name, name) for name in ('fc/kernel', 'fc/bias')]
    found = interchange.to_keras(optimizer.opt_state, nnx.state(model, nnx.Param), pairs)
    assert found['learning_rate'] == np.float32(0.25)


def test_written_state_lies_where_the_parameters_do():
    mesh = jax.make_mesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
    params = _params()
    params['fc']['kernel'] = jax.device_put(params['fc']['kernel'], spec)
    state = interchange.from_torch(_theirs(), _schedules(), params, _fc())
    assert optax.tree.get(state, 'nu')['fc']['kernel'].sharding == spec
    # Counts go along with it.
    jax.jit(_schedules().update)(params, state, params)


def test_the_learning_rate_of_keras_goes_where_it_is_injected():
    params, pairs = {'w': jnp.zeros(2)}, [interchange.Pair('w', 'w')]
    theirs = {
        'rm_sprop/iteration': np.int64(5),
        'rm_sprop/learning_rate': np.float32(0.25),
        'rm_sprop/w_velocity': np.ones(2, 'f'),
    }
    tx = rmsprop_jax.inject_hyperparams(dialects.keras)(0.1)
    state = interchange.from_keras(theirs, tx, params, pairs)
    assert state.hyperparams['learning_rate'] == 0.25
    assert interchange.to_keras(state, params, pairs)['learning_rate'] == np.float32(0.25)
    # A schedule in its place is not overruled, and has to agree.
    tx = rmsprop_jax.inject_hyperparams(dialects.keras)(optax.constant_schedule(0.1))
    (found,) = _problems(lambda: interchange.from_keras(theirs, tx, params, pairs))
    assert found.startswith("'w': learning_rate is 0.25 there, and 0.1 in tx after 5 steps")
    del theirs['rm_sprop/learning_rate']
    state = interchange.from_keras(theirs, tx, params, pairs)
    assert state.hyperparams['learning_rate'] == jnp.float32(0.1)
    assert 'learning_rate' not in interchange.to_keras(state, params, pairs)


# The side of the learning rate, and what a checkpoint says of itself.


def _one(**settings: Any) -> tuple[dict[str, Any], Any, list[interchange.Pair]]:
    """A PyTorch state of one parameter after three steps, the parameter and its pair."""
    entry = {
        'step': np.float32(3),
        'square_avg': np.array([1.0], 'f'),
        'momentum_buffer': np.array([20.0], 'f'),
    }
    group = {'lr': 1e-2, 'momentum': 0.9, 'param_names': ['w'], **settings}
    theirs = {'state': {0: entry}, 'param_groups': [_group([0], **group)]}
    return theirs, {'w': jnp.ones(1)}, [interchange.Pair('w', 'w')]


INSIDE = {
    'rmsprop': lambda lr: rmsprop_jax.rmsprop(lr, 0.99, eps_in_sqrt=False, momentum=0.9),
    # The schedule counts steps, which PyTorch's state needs.
    'optax.rmsprop': lambda lr: optax.chain(
        optax.rmsprop(lr, 0.99, eps_in_sqrt=False, momentum=0.9),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
    ),
    'in a partition': lambda lr: optax.partition(
        {'a': rmsprop_jax.rmsprop(lr, 0.99, eps_in_sqrt=False, momentum=0.9)}, {'w': 'a'}
    ),
    'accumulated': lambda lr: optax.MultiSteps(
        rmsprop_jax.rmsprop(lr, 0.99, eps_in_sqrt=False, momentum=0.9), 3
    ).gradient_transformation(),
}


@pytest.mark.parametrize('name', INSIDE)
def test_a_velocity_goes_to_the_other_side_of_a_constant_rate_and_back(name: str):
    theirs, params, pairs = _one()
    tx = INSIDE[name](1e-2)
    state = interchange.from_torch(theirs, tx, params, pairs)
    np.testing.assert_allclose(optax.tree.get(state, 'trace')['w'], [-0.2], rtol=1e-6)
    back = interchange.to_torch(state, params, pairs, theirs['param_groups'], tx=tx)
    buffer = back['state'][0]['momentum_buffer']
    np.testing.assert_allclose(buffer, [20.0], rtol=1e-6)
    assert buffer.dtype == np.float32


def test_bfloat16_parameters_hide_nothing():
    theirs, _, pairs = _one()
    params = {'w': jnp.ones(1, jnp.bfloat16)}
    state = interchange.from_torch(theirs, INSIDE['rmsprop'](1e-2), params, pairs)
    np.testing.assert_allclose(optax.tree.get(state, 'trace')['w'], [-0.2], rtol=1e-6)


def test_a_velocity_does_not_go_to_the_other_side_of_a_changing_rate():
    theirs, params, pairs = _one()
    tx = INSIDE['rmsprop'](optax.piecewise_constant_schedule(1e-2, {1000: 0.1}))
    (found,) = _problems(lambda: interchange.from_torch(theirs, tx, params, pairs))
    assert found == (
        "'w': in PyTorch the learning rate is outside the velocity, but in tx it is inside the "
        'velocity and changes over time: that is another algorithm, which cannot continue from '
        'this velocity'
    )
    state = tx.init(params)
    groups = theirs['param_groups']
    (found,) = _problems(lambda: interchange.to_torch(state, params, pairs, groups, tx=tx))
    assert 'that is another algorithm' in found
    tx = optax.chain(
        optax.rmsprop(0.1, momentum=0.9), optax.scale_by_schedule(lambda n: 1 / (n + 1))
    )
    moved = {'w/RMSProp': np.ones(1, 'f'), 'w/RMSProp_1': np.ones(1, 'f')}
    (found,) = _problems(lambda: interchange.from_tensorflow(moved, tx, params, pairs, count=3))
    assert found.startswith(
        "'w': in TensorFlow the learning rate is inside the velocity, but in tx"
    )


def test_a_side_that_cannot_be_found_is_refused_naming_both():
    theirs, params, pairs = _one()
    plateau = optax.chain(dialects.torch(1e-2, momentum=0.9), optax.contrib.reduce_on_plateau())
    (found,) = _problems(lambda: interchange.from_torch(theirs, plateau, params, pairs))
    assert found.startswith(
        "'w': in PyTorch the learning rate is outside the velocity, and where it is in tx cannot "
        'be found: tx raises TypeError'
    )


def test_a_rate_that_is_zero_now_is_looked_up_later():
    warmup = optax.linear_schedule(0.0, 1e-2, 10)
    moved = {'w/RMSProp': np.ones(1, 'f'), 'w/RMSProp_1': np.ones(1, 'f')}
    params, pairs = {'w': jnp.ones(1)}, [interchange.Pair('w', 'w')]
    tx = dialects.tensorflow(warmup, momentum=0.9)
    state = interchange.from_tensorflow(moved, tx, params, pairs, count=0)
    assert optax.tree.get(state, 'trace')['w'].tolist() == [-1]


@pytest.mark.parametrize(
    ('said', 'complaint'),
    [
        ({'lr': 0.1}, 'lr is 0.1 there, and 0.01 in tx after '),
        ({'alpha': 0.9}, 'alpha is 0.9 there, and 0.99 in tx'),
        ({'eps': 1e-4}, 'eps is 0.0001 there, and 1e-08 in tx'),
        ({'momentum': 0.5}, 'momentum is 0.5 there, and 0.9 in tx'),
        ({'weight_decay': 0.1}, 'weight_decay is 0.1 there, and '),
        ({'maximize': True}, 'lr is -0.01 there, and 0.01 in tx'),
        ({'lr_in_momentum': True}, 'timm adds epsilon inside the root, and tx outside the root'),
    ],
)
def test_what_groups_say_of_themselves_is_compared(said: dict[str, Any], complaint: str):
    theirs, params, pairs = _one(**said)
    tx = dialects.torch(1e-2, momentum=0.9)
    found = _problems(lambda: interchange.from_torch(theirs, tx, params, pairs))
    assert any(complaint in line for line in found), found
    state = tx.init(params)
    groups = theirs['param_groups']
    found = _problems(lambda: interchange.to_torch(state, params, pairs, groups, tx=tx))
    assert any(complaint in line for line in found), found


def test_groups_without_an_entry_are_not_compared():
    theirs, params, pairs = _one()
    group = theirs['param_groups'][0]
    theirs['param_groups'] = [{key: group[key] for key in ('params', 'param_names')}]
    interchange.from_torch(theirs, dialects.torch(0.3, 0.5, momentum=0.1), params, pairs)


def test_timm_says_itself_where_its_learning_rate_is():
    theirs, params, pairs = _one(lr_in_momentum=True)
    del theirs['param_groups'][0]['maximize']
    tx = dialects.timm(1e-2, 0.99, 1e-8, momentum=0.9)
    state = interchange.from_torch(theirs, tx, params, pairs)
    assert optax.tree.get(state, 'trace')['w'].tolist() == [-20]
    (found,) = _problems(
        lambda: interchange.from_torch(theirs, tx, params, pairs, lr_in_momentum=False)
    )
    assert found == 'group 0: lr_in_momentum is True there, not False'


def test_groups_that_two_libraries_may_have_written_need_a_dialect():
    theirs, params, pairs = _one()
    del theirs['param_groups'][0]['maximize']
    tx = dialects.stable_baselines3(1e-2, momentum=0.9)
    (found,) = _problems(lambda: interchange.from_torch(theirs, tx, params, pairs))
    assert found.endswith('Pass dialect=dialects.torch or dialect=dialects.stable_baselines3')
    interchange.from_torch(theirs, tx, params, pairs, dialect=dialects.stable_baselines3)
    (found,) = _problems(
        lambda: interchange.from_torch(theirs, tx, params, pairs, dialect=dialects.torch)
    )
    assert found == "'w': PyTorch adds epsilon outside the root, and tx inside the root"


def test_the_way_back_needs_the_transformation_where_there_is_a_velocity():
    params, pairs = {'w': jnp.ones(1)}, [interchange.Pair('w', 'w')]
    state = dialects.tensorflow(0.1).init(params)
    for convert, name in (
        (lambda: interchange.to_tensorflow(state, params, pairs), 'tx'),
        (lambda: interchange.to_keras(state, params, pairs), 'tx'),
        (lambda: interchange.to_optax(state, optax.rmsprop(0.1, momentum=0.0), params), 'source'),
    ):
        (found,) = _problems(convert)
        assert "a velocity for 'w'" in found
        assert found.endswith(f'pass {name}, the transformation whose state it is')
    plain = dialects.keras(0.1).init(params)
    assert set(interchange.to_keras(plain, params, pairs)) == {'iteration', 'w_velocity'}


# Keras, which counts calls.


def _accumulating(every: int | None, rate: Any = 0.01) -> Any:
    return dialects.keras(rate, gradient_accumulation_steps=every)


def _keras_variables(**more: Any) -> dict[str, Any]:
    return {'iteration': np.int64(40), 'w_velocity': np.full(1, 0.25, 'f'), **more}


@pytest.mark.parametrize('every', [2, 4, 5, 8])
def test_the_calls_of_a_step_are_found(every: int):
    params, pairs = {'w': jnp.ones(1)}, [interchange.Pair('w', 'w')]
    theirs = _keras_variables(w_gradient_accumulator=np.zeros(1, 'f'))
    for tx in (
        _accumulating(every),
        optax.MultiSteps(_accumulating(None), every).gradient_transformation(),
    ):
        state = interchange.from_keras(theirs, tx, params, pairs)
        counts = optax.tree.get_all_with_path(state, 'count')
        assert {int(count) for _, count in counts} == {40 // every}
        back = interchange.to_keras(state, params, pairs, tx=tx)
        assert_same(back, theirs)


@pytest.mark.parametrize('frequency', [None, 1, 3])
@pytest.mark.parametrize('make', [dialects.keras, dialects.tf_keras])
def test_averages_that_overwrite_do_not_hide_the_rate(make, frequency):
    """Also where every step is overwritten, of which a share `1 - ema_momentum` is left."""
    options = {'ema_momentum': 0.75, 'ema_overwrite_frequency': frequency}
    tx = make(0.125, momentum=0.5, weight_decay=0.1, use_ema=True, **options)
    params, pairs = {'w': jnp.array([0.5, -2.0])}, [interchange.Pair('w', 'w')]
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    theirs = interchange.to_keras(state, params, pairs, tx=tx, learning_rate=0.125)
    back = interchange.from_keras(theirs, tx, params, pairs)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    (found, *_) = _problems(
        lambda: interchange.from_keras({**theirs, 'learning_rate': 0.5}, tx, params, pairs)
    )
    assert 'learning_rate is 0.5 there, and 0.125 in tx' in found


def test_a_schedule_reads_the_count_of_keras_after_an_accumulation():
    """Of 40 calls at 4 a step: the next step is Keras's, at the rate of its 43rd call."""
    rate = optax.exponential_decay(0.01, 10, 0.5)
    params, pairs = {'w': jnp.ones(1)}, [interchange.Pair('w', 'w')]
    theirs = _keras_variables(w_gradient_accumulator=np.zeros(1, 'f'))
    tx = _accumulating(4, rate)
    state = interchange.from_keras(theirs, tx, params, pairs)
    for _ in range(3):
        _, state = tx.update({'w': jnp.full(1, 0.5)}, state, params)
    update, _ = tx.update({'w': jnp.full(1, 0.5)}, state, params)
    nu = 0.9 * 0.25 + 0.1 * 0.25
    np.testing.assert_allclose(
        update['w'], -0.01 * 0.5 ** (43 / 10) * 0.5 / np.sqrt(nu + 1e-7), rtol=1e-5
    )


def test_contradictions_about_accumulation_and_rate_are_refused():
    params, pairs = {'w': jnp.ones(1)}, [interchange.Pair('w', 'w')]
    held = {'w_gradient_accumulator': np.zeros(1, 'f')}

    def problem(variables: Any, tx: Any, **given: Any) -> str:
        (found,) = _problems(lambda: interchange.from_keras(variables, tx, params, pairs, **given))
        return found

    assert 'tx takes a step at every call:' in problem(
        _keras_variables(**held), _accumulating(None)
    )
    assert 'Keras has no gradient acc' in problem(_keras_variables(), _accumulating(4))
    found = problem(_keras_variables(**held), _accumulating(4), gradient_accumulation_steps=2)
    assert found == 'gradient_accumulation_steps is 2, but tx takes a step at every 4 calls'
    found = problem(_keras_variables(learning_rate=np.float32(0.001)), _accumulating(None))
    assert found.startswith("'w': learning_rate is 0.001 there, and 0.01 in tx after 40 steps")
    tx = _accumulating(4)
    (found,) = _problems(lambda: interchange.to_keras(tx.init(params), params, pairs))
    assert 'the state accumulates gradients: pass tx' in found
    (found,) = _problems(
        lambda: interchange.to_keras(tx.init(params), params, pairs, tx=tx, learning_rate=0.1)
    )
    assert found.startswith("'w': learning_rate is 0.1 there, and 0.01 in tx after 0 steps")


# What does not fit is refused, all at once.


def _problems(call: Any) -> tuple[str, ...]:
    with pytest.raises(interchange.InterchangeError) as caught:
        call()
    return caught.value.problems


def test_every_offending_entry_is_listed():
    theirs, params = _theirs(), _params()
    theirs['state'][0]['square_avg'] = np.full((3, 2), np.nan, 'f')
    del theirs['state'][0]['momentum_buffer']
    theirs['state'][1]['square_avg'] = np.arange(3)
    theirs['state'][1]['momentum_buffer'] = np.zeros(4, 'f')
    theirs['state'][1]['exp_avg'] = np.zeros(3, 'f')
    theirs['state'][1]['step'] = np.float32(1.5)
    theirs['state'][2] = {}
    found = _problems(lambda: interchange.from_torch(theirs, _schedules(), params, _fc()))
    assert set(found) == {
        "square_avg of 'fc.weight' is not finite",
        "momentum_buffer of 'fc.weight' is missing",
        "square_avg of 'fc.bias' has dtype int64, not a floating or complex one",
        "momentum_buffer of 'fc.bias' has shape (4,) with our axes where 'fc/bias' has (3,): "
        "are the names in the optimizer's order?",
        "exp_avg of 'fc.bias' is not part of the state of RMSProp",
        "step of 'fc.bias' is missing or not a step count",
        'state 2 does not belong to any parameter of the groups',
        'parameters have taken different numbers of steps (0: fc.bias; 7: fc.weight): pass count',
    }


def test_moments_without_a_place_are_refused():
    params = _params()
    found = _problems(lambda: interchange.from_torch(_theirs(), dialects.torch(0.1), params, _fc()))
    assert found[:2] == tuple(
        f"'fc/{name}': momentum is 0.9 there, and 0 in tx after 7 steps: change one of the two, or "
        'delete the entry from group 0 to leave it uncompared'
        for name in ('kernel', 'bias')
    )
    assert found[2:] == tuple(
        f'momentum_buffer of {name!r} has no place: the state has no trace for {path!r}'
        for name, path in (('fc.weight', 'fc/kernel'), ('fc.bias', 'fc/bias'))
    )
    found = _problems(
        lambda: interchange.from_torch(
            _theirs(), dialects.torch(0.1, momentum=0.9, centered=True), params, _fc()
        )
    )
    assert set(found) == {"grad_avg of 'fc.weight' is missing", "grad_avg of 'fc.bias' is missing"}


@pytest.mark.parametrize(
    ('array', 'complaint'),
    [
        (-np.ones((3, 2), 'f'), 'is negative'),
        (np.full((3, 2), 1e300), 'does not fit into float32'),
        (np.full((3, 2), 1j), 'has dtype complex128 where ours is float32'),
        (np.ones(6, 'f'), 'its 1 axes cannot be laid out'),
        ([[1.0], [1.0, 2.0]], 'cannot be read as an array'),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused(array: Any, complaint: str):
    theirs = _theirs()
    theirs['state'][0]['square_avg'] = array
    found = _problems(lambda: interchange.from_torch(theirs, _schedules(), _params(), _fc()))
    assert complaint in found[0]
    assert "square_avg of 'fc.weight'" in found[0]


class BFloat16:
    """A tensor as PyTorch's are whose dtype NumPy does not have."""

    shape = (3, 2)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError('Got unsupported ScalarType BFloat16')


def test_tensors_in_bfloat16_are_to_be_widened():
    theirs = _theirs()
    theirs['state'][0]['square_avg'] = BFloat16()
    found = _problems(lambda: interchange.from_torch(theirs, _schedules(), _params(), _fc()))
    assert found == (
        "square_avg of 'fc.weight' cannot be read as an array: Got unsupported ScalarType "
        'BFloat16. Pass tensor.float(), which loses nothing',
    )


def test_a_shared_second_moment_of_complex_parameters_does_not_become_pytorchs():
    params = {'w': jnp.zeros(2, jnp.complex64)}
    pairs, groups = [interchange.Pair('w', 'w')], [_group([0]) | {'param_names': ['w']}]
    state = rmsprop_jax.rmsprop(0.1).init(params)
    found = _problems(lambda: interchange.to_torch(state, params, pairs, groups))
    assert found == (
        "nu of 'w' is shared by real and imaginary parts, and PyTorch has one for each",
    )


def test_names_must_cover_the_numbers():
    theirs, params = _theirs(), _params()
    del theirs['param_groups'][0]['param_names']
    found = _problems(lambda: interchange.from_torch(theirs, _schedules(), params, _fc()))
    assert "the groups have no param_names: pass names, in the optimizer's order" in found
    for names, complaint in (
        (['fc.weight'], '2 parameters are in the groups, but 1 in names'),
        (['fc.weight', 'fc.weight'], "'fc.weight' is in names more than once"),
        (['fc.weight', 'other'], "'other' is not in any pair"),
    ):
        found = _problems(
            lambda names=names: interchange.from_torch(
                theirs, _schedules(), params, _fc(), names=names
            )
        )
        assert complaint in found


def test_parameters_without_state_are_named_fresh():
    theirs, params = _theirs(), _params()
    del theirs['state'][1]
    missing = _problems(lambda: interchange.from_torch(theirs, _schedules(), params, _fc()))
    assert "square_avg of 'fc.bias' is missing" in missing
    state = interchange.from_torch(theirs, _schedules(), params, _fc(), fresh=['fc.bias'])
    assert not optax.tree.get(state, 'trace')['fc']['bias'].any()
    found = _problems(
        lambda: interchange.from_torch(_theirs(), _schedules(), params, _fc(), fresh=['fc.bias'])
    )
    assert found == ("'fc.bias', said to be fresh, has an entry in the state",)


def test_a_count_can_be_given_where_steps_differ():
    theirs, params = _theirs(), _params()
    theirs['state'][1]['step'] = np.float32(3)
    found = _problems(lambda: interchange.from_torch(theirs, _schedules(), params, _fc()))
    assert found[0].endswith('(3: fc.bias; 7: fc.weight): pass count')
    theirs['param_groups'][0]['lr'] = 0.05
    state = interchange.from_torch(theirs, _schedules(), params, _fc(), count=2**40)
    assert state[0].count == 2**31 - 1


@pytest.mark.parametrize('step', [None, np.inf, np.nan, -1, 1.5, 'seven', np.zeros(2)])
def test_a_step_that_counts_nothing_is_refused(step: Any):
    theirs = _theirs(step=step)
    found = _problems(lambda: interchange.from_torch(theirs, _schedules(), _params(), _fc()))
    assert found == tuple(
        f'step of {name!r} is missing or not a step count' for name in ('fc.weight', 'fc.bias')
    )


def test_groups_of_another_optimizer_are_refused():
    theirs, params = _theirs(), _params()
    theirs['param_groups'][0] |= {'betas': (0.9, 0.99), 'alpha': 2.0}
    del theirs['param_groups'][0]['eps']
    found = _problems(lambda: interchange.torch_optimizer(theirs, params, _fc()))
    assert "group 0: 'betas' is not a setting of torch.optim.RMSprop" in found
    assert "group 0: 'eps' is missing" in found
    assert any('alpha must be in [0, 1]' in line for line in found)


def test_parameters_that_the_optimizer_lacks_stay():
    theirs, params = _theirs(), _params() | {'frozen': jnp.ones(2)}
    tx = interchange.torch_optimizer(theirs, params, _fc())
    state = interchange.from_torch(theirs, tx, params, _fc())
    updates, _ = tx.update(params, state, params)
    assert not updates['frozen'].any()


def test_numbers_of_keras_must_be_numbers():
    params, tx = {'w': jnp.zeros(2)}, dialects.keras(0.1)
    pairs = [interchange.Pair('w', 'w')]
    theirs = {'iteration': np.int64(7), 'w_velocity': np.ones(2, 'f')}
    for rate in (np.ones(3), 1j, 'x', np.nan):
        found = _problems(
            lambda rate=rate: interchange.from_keras(
                theirs | {'learning_rate': rate}, tx, params, pairs
            )
        )
        assert found == ("'learning_rate' is not a finite number",)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'nu': {'w': 'x'}}, r"^theirs\[0\].nu\['w'\] is a str, not an array"),
        ({'nu': {'w': np.array(['x', 'y'])}}, r"nu of 'w' has dtype <U1, not a floating"),
        ({'nu': {'w': np.ones(2, int)}}, r"nu of 'w' has dtype int64, not a floating"),
        ({'nu': {'w': jnp.ones(2), 3: jnp.ones(2)}}, '^theirs is not a tree: '),
    ],
)
def test_states_of_optax_with_anything_in_them_are_refused(changes, message):
    params, theirs = {'w': jnp.zeros(2)}, optax.rmsprop(0.1)
    first, *rest = tuple(theirs.init(params))  # pyright: ignore[reportArgumentType]
    with pytest.raises((TypeError, ValueError), match=message):
        interchange.from_optax(
            (first._replace(**changes), *rest), rmsprop_jax.rmsprop(0.1), params, count=1
        )


def test_a_schedule_may_stand_in_a_group():
    theirs, params = _theirs(), _params()
    theirs['param_groups'][0]['lr'] = optax.piecewise_constant_schedule(1.0, {8: 0.0})
    tx = interchange.torch_optimizer(theirs, params, _fc())
    state = interchange.from_torch(theirs, tx, params, _fc())
    moves = []
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        moves.append(bool(updates['fc']['bias'].any()))
    # Seven steps are behind; the eighth has number 7.
    assert moves == [True, False]


def test_to_torch_wants_groups_that_go_with_the_moments():
    params, groups = _params(), _theirs()['param_groups']
    state = dialects.torch(centered=True).init(params)
    found = _problems(lambda: interchange.to_torch(state, params, _fc(), groups))
    assert "'fc.weight' has momentum=0.9 in its group, but the state has no trace" in found
    assert "'fc.weight' has centered=False in its group, but the state has mu" in found
    tx = _schedules()
    state = tx.init(params)
    halved = [_group([0], momentum=0.9) | {'param_names': ['fc.weight']}]
    found = _problems(lambda: interchange.to_torch(state, params, _fc(), halved, tx=tx))
    assert found == tuple(
        f"{m} of 'fc/bias' belongs to no parameter of the groups" for m in ('nu', 'trace')
    )


def test_timm_keeps_the_learning_rate_in_the_buffer():
    params = _params()
    tx = dialects.timm(0.1, 0.99, 1e-8, momentum=0.9)
    theirs = _theirs()
    del theirs['param_groups'][0]['maximize']
    state = interchange.from_torch(theirs, tx, params, _fc(), lr_in_momentum=True)
    np.testing.assert_array_equal(optax.tree.get(state, 'trace')['fc']['bias'], [-1, -2, -3])
    found = interchange.to_torch(
        state, params, _fc(), theirs['param_groups'], lr_in_momentum=True, tx=tx
    )
    assert_same(found['state'], theirs['state'])


def test_tensorflow_slots_left_over_are_refused_and_other_variables_are_not():
    params, pairs = {'w': jnp.zeros(2)}, [interchange.Pair('w', 'w')]
    theirs = {
        'w': np.zeros(2, 'f'),
        'w/RMSProp': np.ones(2, 'f'),
        'w/RMSProp_1': np.ones(2, 'f'),
        'w/Adam': np.ones(2, 'f'),
        'global_step': np.int64(4),
    }
    tx = dialects.tensorflow(0.1)
    state = interchange.from_tensorflow(theirs, tx, params, pairs)
    assert optax.tree.get(state, 'trace')['w'].tolist() == [-1, -1]
    theirs |= {'v/RMSProp': np.ones(2, 'f'), 'w/RMSProp_2': np.ones(2, 'f')}
    del theirs['global_step']
    found = _problems(lambda: interchange.from_tensorflow(theirs, tx, params, pairs))
    assert set(found) == {
        "'v/RMSProp' does not belong to any pair",
        "'w/RMSProp_2' does not belong to any pair",
        "'global_step' is missing or not a step count: pass count",
    }
    slots = {'w/rms': np.ones(2, 'f'), 'w/momentum': np.zeros(2, 'f')}
    state = interchange.from_tensorflow(slots, tx, params, pairs, name=None, count=4)
    assert set(interchange.to_tensorflow(state, params, pairs, tx=tx, name=None)) == {
        'global_step',
        *slots,
    }


def test_keras_variables_left_over_or_missing_are_refused():
    params, pairs = {'w': jnp.zeros(2)}, [interchange.Pair('net/w', 'w')]
    theirs = {'net_v_velocity': np.ones(2, 'f'), 'learning_rate': np.float32(0.1)}
    found = _problems(lambda: interchange.from_keras(theirs, dialects.keras(), params, pairs))
    assert set(found) == {
        "'iteration' is missing or not a step count",
        "'net_v_velocity' does not belong to any pair",
        "'net_w_velocity' is missing",
    }


def test_bias_correction_has_no_counterpart_in_the_other_frameworks():
    params, pairs = {'w': jnp.zeros(2)}, [interchange.Pair('w', 'w')]
    state = rmsprop_jax.rmsprop(0.1, bias_correction=True, momentum=0.5).init(params)
    groups = [_group([0], momentum=0.5) | {'param_names': ['w']}]
    for convert, name in (
        (lambda: interchange.to_keras(state, params, pairs), 'Keras'),
        (lambda: interchange.to_tensorflow(state, params, pairs), 'TensorFlow'),
        (lambda: interchange.to_torch(state, params, pairs, groups), 'PyTorch'),
    ):
        assert f"'w' is bias-corrected, which {name} does not support" in _problems(convert)


def test_a_variance_below_zero_is_zero_and_a_warning_says_where():
    mean = np.array([1.0, 2.0, 3.0], 'f')
    second = mean**2 * np.array([1.5, 1 - 1e-7, 1.0], 'f')
    fine = {'step': np.float32(7), 'square_avg': np.ones((3, 2), 'f')}
    fine['grad_avg'] = np.zeros((3, 2), 'f')
    theirs = {
        'state': {0: fine, 1: {**fine, 'square_avg': second, 'grad_avg': mean}},
        'param_groups': [_group([0, 1], centered=True)],
    }
    names, params = ['fc.weight', 'fc.bias'], _params()
    tx = dialects.torch(0.1, centered=True)
    with pytest.warns(interchange.LossyConversionWarning, match=r'in fc/bias$') as caught:
        state = interchange.from_torch(theirs, tx, params, _fc(), names=names)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(
        optax.tree.get(state, 'var')['fc']['bias'], np.array([0.5, 0, 0], 'f')
    )
    theirs['state'][1]['square_avg'] = mean**2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        interchange.from_torch(theirs, tx, params, _fc(), names=names)


# Mappings.


@pytest.mark.parametrize(
    ('layout', 'shape', 'turned'),
    [
        (interchange.AS_IS, (2, 3), (2, 3)),
        (interchange.KERNEL, (5, 3), (3, 5)),
        (interchange.KERNEL, (5, 3, 7), (7, 3, 5)),
        (interchange.KERNEL, (5, 3, 7, 8, 9), (7, 8, 9, 3, 5)),
        (interchange.Layout((2, 0, 1)), (2, 3, 4), (4, 2, 3)),
        (interchange.flattened(2, 3, 4), (5, 24), (24, 5)),
        (interchange.Layout((1,)), (1, 6), (6,)),
        (interchange.Layout((2, 0)), (5, 1, 3), (3, 5)),
        (interchange.Layout(blocks=(1, 2, 0)), (2, 6), (2, 6)),
        (interchange.Layout((1, 0), blocks=(1, 2, 0)), (6, 2), (2, 6)),
    ],
)
def test_layouts_have_inverses(layout: Any, shape: tuple[int, ...], turned: tuple[int, ...]):
    array = np.arange(np.prod(shape)).reshape(shape)
    assert layout.to_ours(array).shape == turned
    np.testing.assert_array_equal(layout.to_theirs(layout.to_ours(array)), array)


def test_blocks_are_those_of_our_last_axis():
    layout = interchange.Layout((1, 0), blocks=(1, 2, 0))
    columns = layout.to_ours(np.arange(12).reshape(6, 2))[0]
    assert columns.tolist() == [4, 6, 8, 10, 0, 2]


def test_a_flattened_image_meets_the_same_weights():
    image, weights = problem.wave((2, 3, 4), 0.3), problem.wave((5, 24), 0.7)
    there = weights @ image.ravel()
    kernel = interchange.flattened(2, 3, 4).to_ours(weights)
    np.testing.assert_allclose(image.transpose(1, 2, 0).ravel() @ kernel, there, rtol=1e-12)


def test_a_layout_refuses_axes_it_does_not_speak_of():
    with pytest.raises(ValueError, match='its 3 axes cannot be laid out'):
        interchange.Layout((1, 0)).to_ours(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match='its axes .0. are not of length one'):
        interchange.Layout((1,)).to_ours(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r'\(5,\) has not 3 equal parts on axis 0'):
        interchange.Layout(blocks=(1, 0, 2)).to_theirs(np.zeros(5))
    with pytest.raises(ValueError, match='not a matrix of 6 features'):
        interchange.flattened(2, 3).to_ours(np.zeros((4, 5)))


def test_parameters_go_both_ways_and_every_misfit_is_listed():
    theirs = {'fc.weight': np.arange(6, dtype='f').reshape(3, 2), 'fc.bias': np.zeros(3, 'f')}
    found = interchange.parameters_from(theirs, _params(), _fc())
    np.testing.assert_array_equal(found['fc']['kernel'], theirs['fc.weight'].T)
    assert_same(interchange.parameters_to(found, _fc()), theirs)
    assert list(interchange.parameters_to(found, _fc())) == ['fc.weight', 'fc.bias']

    theirs = {'fc.weight': np.zeros((4, 2)), 'bn.weight': np.ones(3)}
    pairs = (*_fc(), interchange.Pair('other', 'fc/bias'), interchange.Pair('out', 'out'))
    like = _params() | {'lone': jnp.zeros(())}
    assert set(_problems(lambda: interchange.parameters_from(theirs, like, pairs))) == {
        "'fc/bias' is the `ours` of more than one pair",
        "'out', paired with 'out', is not in params",
        "'bn.weight' is not in any pair",
        "'fc.weight' has shape (2, 4) where ours is (2, 3)",
        "'other', paired with 'fc/bias', is missing",
        "'lone' is not in any pair",
    }
    assert "'lone' is not in any pair" in _problems(lambda: interchange.parameters_to(like, pairs))


def test_ready_made_pairs():
    def named(pairs: Any) -> dict[str, str]:
        return {pair.theirs: pair.ours for pair in pairs}

    assert named(interchange.torch.conv('c', ('a', 0), bias=False)) == {'c.weight': 'a/0/kernel'}
    assert named(interchange.torch.norm('n', 'n')) == {'n.weight': 'n/scale', 'n.bias': 'n/bias'}
    assert named(interchange.keras.norm('n', 'n')) == {'n/gamma': 'n/scale', 'n/beta': 'n/bias'}
    assert named(interchange.keras.conv('c', 'c', bias=False)) == {'c/kernel': 'c/kernel'}


def test_no_framework_is_imported():
    program = """
import sys
for name in ('torch', 'tensorflow', 'keras', 'flax'):
    sys.modules[name] = None
import rmsprop_jax.interchange
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, '-c', program], check=True, cwd=problem.FOLDER.parents[1])


# Starting again.


def _after(tx: Any, params: Any, steps: int = 3) -> Any:
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    return state


RESETS = {
    'rmsprop': lambda: rmsprop_jax.rmsprop(
        optax.linear_schedule(0.1, 0.0, 9), initial_scale=0.5, centered=True, momentum=0.9
    ),
    'torch': lambda: dialects.torch(momentum=0.9, centered=True),
    'chain': lambda: optax.chain(optax.clip(1.0), dialects.tensorflow(0.1, momentum=0.9)),
    'masked': lambda: optax.masked(dialects.timm(momentum=0.9), {'fc': True}),
    'partition': lambda: optax.partition(
        {'a': dialects.torch(momentum=0.9), 'b': dialects.tensorflow(0.1)},
        {'fc': {'kernel': 'a', 'bias': 'b'}},
    ),
    'MultiSteps': lambda: optax.MultiSteps(dialects.torch(), 2).gradient_transformation(),
    'inject': lambda: rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(
        0.1, initial_scale=2.0, momentum=0.9
    ),
}


@pytest.mark.parametrize('name', RESETS)
def test_reset_gives_start_values_to_what_is_selected_and_leaves_the_rest(name: str):
    tx, params = RESETS[name](), _params()
    state, start = _after(tx, params), tx.init(params)
    found = reset(tx, state, params, {'fc': {'kernel': True, 'bias': False}})
    assert jax.tree.structure(found) == jax.tree.structure(state)
    leaves = zip(
        jax.tree_util.tree_flatten_with_path(found)[0],
        jax.tree.leaves(state),
        jax.tree.leaves(start),
        strict=True,
    )
    changed = 0
    for (path, new), old, fresh in leaves:
        selected = 'kernel' in jax.tree_util.keystr(path)
        np.testing.assert_array_equal(new, fresh if selected else old)
        assert new.dtype == old.dtype
        changed += bool((np.asarray(new) != np.asarray(old)).any())
    assert changed
    jax.jit(tx.update)(params, found, params)


def test_reset_takes_prefixes_and_functions_and_works_in_jit():
    tx, params = dialects.tensorflow(0.1), _params() | {'head': jnp.ones(2)}
    state = _after(tx, params)

    def selected(params: Any) -> Any:
        return {name: name == 'head' for name in params}

    by_prefix = reset(tx, state, params, {'fc': False, 'head': True})
    by_function = jax.jit(lambda s, p: reset(tx, s, p, selected))(state, params)
    everything = reset(tx, state, params, True)
    jax.tree.map(np.testing.assert_array_equal, by_prefix, by_function)
    assert optax.tree.get(by_prefix, 'nu')['head'].tolist() == [1, 1]
    assert optax.tree.get(by_prefix, 'nu')['fc']['bias'][0] != 0
    assert everything[0].count == 3
    jax.tree.map(np.testing.assert_array_equal, everything[0].nu, tx.init(params)[0].nu)


def test_reset_starts_the_weights_again_where_all_that_share_them_do():
    tx, params = rmsprop_jax.rmsprop(0.1, bias_correction=True), _params()
    state = _after(tx, params)
    some = reset(tx, state, params, {'fc': {'kernel': True, 'bias': False}})
    assert some[0].weight == state[0].weight
    everything = reset(tx, state, params, True)
    assert everything[0].weight == 0
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), everything)
    np.testing.assert_allclose(updates['fc']['bias'], -0.1, rtol=1e-6)


def test_reset_starts_an_average_of_parameters_from_the_new_ones():
    tx = optax.masked(dialects.keras(use_ema=True), {'fc': True, 'head': False})
    params = _params() | {'head': {'bias': jnp.ones(2)}}
    state = _after(tx, params)
    params['fc']['bias'] = jnp.full(3, 5.0)
    found = reset(tx, state, params, {'fc': {'kernel': False, 'bias': True}, 'head': True})
    assert optax.tree.get(found, 'ema')['fc']['bias'].tolist() == [5, 5, 5]
    np.testing.assert_array_equal(
        optax.tree.get(found, 'ema')['fc']['kernel'], optax.tree.get(state, 'ema')['fc']['kernel']
    )


def test_reset_refuses_what_does_not_belong_together():
    tx, params = dialects.torch(), _params()
    state = _after(tx, params)
    with pytest.raises(TypeError, match=r"mask\['fc'\]\['kernel'\] must be True or False,.*got 1"):
        reset(tx, state, params, {'fc': {'kernel': 1, 'bias': False}})
    with pytest.raises(ValueError, match=r'of state does not match that of tx.init\(params\)'):
        reset(dialects.torch(momentum=0.9), state, params, True)
    with pytest.raises(ValueError, match='prefix|structure'):
        reset(tx, state, params, {'head': True})
