"""What PyTorch's parameter groups say of a run, and what they leave open."""

import copy
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interchange_data import problem
from interchange_data import record_groups as recorded

from rmsprop_jax import dialects, interchange, recipes

HALF, END, RATE = recorded.HALF, recorded.END, recorded.RATE
LATER, NEVER = recorded.LATER, recorded.NEVER
EXACT = 1e-12
ROOT = pathlib.Path(__file__).parents[1]
PAIRS = (*interchange.torch.linear('a', 'a'), *interchange.torch.linear('b', 'b'))
NAMES = list(recorded.SHAPES)


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def run_of(case: str) -> dict[str, Any]:
    return problem.read(problem.FOLDER / 'groups.npz', case)


def ours(theirs: Any) -> Any:
    like = {layer: {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(3)} for layer in ('a', 'b')}
    return interchange.parameters_from(theirs, like, PAIRS)


def trained(tx: Any, params: Any, state: Any, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Their names, after the second half of the recorded run."""
    update = jax.jit(tx.update)
    for step in range(HALF, END):
        gradients = ours(problem.gradient(interchange.parameters_to(params, PAIRS), step))
        gradients = jax.tree.map(lambda g: scale * g, gradients)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return interchange.parameters_to(params, PAIRS)


def assert_goes_on(run: dict[str, Any], found: dict[str, np.ndarray]) -> None:
    assert set(found) == set(run['end'])
    for name, wanted in run['end'].items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=EXACT, err_msg=name)


def moved(
    run: dict[str, Any],
    names: list[str] | None = None,
    lr_in_momentum: bool | None = None,
    frozen: Any = (),
    fresh: Any = (),
    **given: Any,
) -> dict[str, np.ndarray]:
    """Where a recorded run ends if it moves here halfway."""
    params, who = ours(run['params']), {'names': names, 'frozen': frozen, 'fresh': fresh}
    tx = interchange.torch_optimizer(run['state'], params, PAIRS, **who, **given)
    whose = {'lr_in_momentum': lr_in_momentum, 'dialect': given.get('dialect')}
    state = interchange.from_torch(run['state'], tx, params, PAIRS, **whose, **who)
    return trained(tx, params, state)


def problems(call: Callable[[], Any]) -> str:
    with pytest.raises(interchange.InterchangeError) as caught:
        call()
    return '\n'.join(caught.value.problems)


@pytest.mark.extended
def test_weights_with_pytorchs_names_and_axes_need_no_layouts():
    """As torchax has them, for every group: steps are the recorded ones."""
    run = run_of('gradless')
    params = {name: jnp.asarray(x) for name, x in run['params'].items()}
    pairs = [interchange.Pair(name, name) for name in params]
    tx = interchange.torch_optimizer(run['state'], params, pairs, frozen=[LATER])
    state = interchange.from_torch(run['state'], tx, params, pairs, frozen=[LATER])
    update = jax.jit(tx.update)
    for step in range(HALF, END):
        updates, state = update(problem.gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    assert_goes_on(run, params)


def described(run: dict[str, Any], **given: Any) -> Any:
    return interchange.torch_optimizer(run['state'], ours(run['params']), PAIRS, **given)


# Parameters that PyTorch does not touch.


def test_a_parameter_without_a_gradient_does_not_move():
    run = run_of('gradless')
    found = moved(run, frozen=[LATER])
    assert_goes_on(run, found)
    # In PyTorch not even weight decay, which is 0.5 here, moved them.
    np.testing.assert_array_equal(found[NEVER], recorded.params()[NEVER])
    np.testing.assert_array_equal(found[LATER], run['params'][LATER])


def test_a_parameter_without_state_moves_once_it_is_said_to_be_fresh():
    run = run_of('gradless')
    found = moved(run, frozen=[LATER], fresh=[NEVER])
    p, nu, group = run['params'][NEVER], 0.0, run['state']['param_groups'][1]
    for step in range(HALF, END):
        g = problem.gradient({NEVER: p}, step)[NEVER] + group['weight_decay'] * p
        nu = group['alpha'] * nu + (1 - group['alpha']) * g**2
        p = p - group['lr'] * g / (np.sqrt(nu) + group['eps'])
    np.testing.assert_allclose(found[NEVER], p, rtol=0, atol=EXACT)


def test_a_norm_counts_the_gradients_that_it_is_given():
    run, clip = run_of('clipped'), dialects.torch_clip_grad_norm(recorded.MAX_NORM)
    params = ours(run['params'])
    inner = described(run)
    state = interchange.from_torch(run['state'], inner, params, PAIRS)
    tx = optax.chain(clip, inner)
    for stopped in (True, False):

        def update(gradients: Any, state: Any, params: Any, stopped: bool = stopped) -> Any:
            if stopped:
                untouched = {'a': {'kernel': 1, 'bias': 1}, 'b': {'kernel': 0, 'bias': 0}}
                gradients = jax.tree.map(lambda g, keep: g * keep, gradients, untouched)
            return tx.update(gradients, state, params)

        found = trained(
            optax.GradientTransformation(tx.init, update), params, (optax.EmptyState(), state)
        )
        if stopped:
            assert_goes_on(run, found)
        else:
            assert abs(found['a.bias'] - run['end']['a.bias']).max() > 1e-6


def test_an_entry_without_anything_in_it_is_none():
    run = run_of('gradless')
    names = [name for group in run['state']['param_groups'] for name in group['param_names']]
    run['state']['state'][names.index(NEVER)] = {}
    assert_goes_on(run, moved(run, frozen=[LATER]))


def test_everything_moves_in_a_run_that_has_not_begun():
    run = run_of('gradless')
    run['state']['state'] = {}
    params = ours(run['params'])
    tx = described(run)
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(np.all(u != 0) for u in jax.tree.leaves(updates))


def test_what_is_said_of_parameters_must_fit():
    run = run_of('gradless')
    params = ours(run['params'])
    for convert in (
        lambda **given: described(run, **given),
        lambda **given: interchange.from_torch(
            run['state'], dialects.torch(), params, PAIRS, **given
        ),
    ):
        found = problems(
            lambda convert=convert: convert(fresh=[LATER, 'c', NEVER], frozen=[NEVER, 'd'])
        )
        assert f'{LATER!r}, said to be fresh, has an entry in the state' in found
        assert f'{NEVER!r} is said to be both fresh and frozen' in found
        assert "'c', said to be fresh, is not in any pair" in found
        assert "'d', said to be frozen, is not in any pair" in found
        for name in ('fresh', 'frozen'):
            with pytest.raises(TypeError, match=f'{name} must be a collection of names'):
                convert(**{name: NEVER})


def test_a_transformation_that_moves_a_frozen_parameter_is_refused():
    run = run_of('gradless')
    del run['state']['state'][0], run['state']['state'][2]
    tx, params = dialects.torch(momentum=0.9), ours(run['params'])
    # What tx does otherwise is not what is asked here.
    for group in run['state']['param_groups']:
        for setting in ('lr', 'alpha', 'eps', 'weight_decay', 'momentum'):
            del group[setting]
    given = {'frozen': [LATER], 'fresh': ['a.weight', 'a.bias', NEVER]}
    found = problems(lambda: interchange.from_torch(run['state'], tx, params, PAIRS, **given))
    assert found.split('\n') == [
        f'{slot} of {LATER!r}, said to be frozen but with a place in tx, is missing'
        for slot in ('square_avg', 'momentum_buffer')
    ]


def test_a_state_of_other_numbers_is_refused():
    run = run_of('gradless')
    run['state']['state'] = {str(k): v for k, v in run['state']['state'].items()}
    assert "state '0' does not belong to any parameter of the groups" in problems(
        lambda: described(run)
    )


def test_frozen_parameters_go_back_without_an_entry():
    run = run_of('gradless')
    params, groups = ours(run['params']), run['state']['param_groups']
    tx = described(run, frozen=[LATER])
    state = interchange.from_torch(run['state'], tx, params, PAIRS, frozen=[LATER])
    back = interchange.to_torch(state, params, PAIRS, groups, fresh=[LATER, NEVER], tx=tx)
    assert set(back['state']) == {0, 2}
    np.testing.assert_array_equal(
        back['state'][0]['square_avg'], run['state']['state'][0]['square_avg']
    )


# The order of the parameters.


def test_groups_in_another_order_than_the_models():
    run = run_of('reordered')
    names = run['names']['found'].tolist()
    assert names == recorded.ORDER != NAMES
    assert_goes_on(run, moved(run, names=names))


def test_arrays_of_another_shape_than_their_parameter_name_both():
    run = run_of('reordered')
    names = ['b.bias', 'b.weight', 'a.weight', 'a.bias']
    params = ours(run['params'])
    lines = (
        "square_avg of 'b.bias' has shape (3, 2) with our axes where 'b/bias' has (3,)",
        "square_avg of 'b.weight': its 1 axes cannot be laid out as (Ellipsis, 1, 0) where "
        "'b/kernel' has (2, 3): are the names in the optimizer's order?",
    )
    calls = (
        lambda: described(run, names=names),
        lambda: interchange.from_torch(run['state'], dialects.torch(), params, PAIRS, names=names),
    )
    for call in calls:
        found = problems(call)
        assert all(line in found for line in lines)


def test_without_names_that_is_all_there_is_to_say():
    run = run_of('reordered')
    found = problems(lambda: described(run))
    assert found == "the groups have no param_names: pass names, in the optimizer's order"


def test_names_that_are_those_of_the_groups_in_another_order_are_refused():
    run = run_of('timm')
    found = problems(lambda: described(run, names=NAMES[::-1]))
    assert "names has the groups' own names in another order: leave it out" in found
    described(run, names=NAMES)
    params = ours(run['params'])
    state = dialects.timm(momentum=0.9).init(params)
    groups = run['state']['param_groups']
    call = lambda: interchange.to_torch(state, params, PAIRS, groups, names=NAMES[::-1])  # noqa: E731
    assert 'in another order' in problems(call)


# Whose state it is.


def falling(count: Any) -> Any:
    """Stable-Baselines3's linear schedule: progress after the rollout of an update."""
    return RATE * (1 - (count + 1) * (recorded.BATCH / recorded.TOTAL))


def test_stable_baselines3_must_be_named():
    run = run_of('stable_baselines3')
    found = problems(lambda: described(run, names=NAMES))
    assert "PyTorch before 1.12 and Stable-Baselines3's RMSpropTFLike" in found
    assert 'dialect=dialects.stable_baselines3' in found
    dialect = dialects.stable_baselines3
    assert_goes_on(run, moved(run, names=NAMES, dialect=dialect, learning_rate=falling))
    np.testing.assert_allclose(run['rates']['used'], falling(np.arange(END)), rtol=1e-12)


def test_the_state_of_timm_is_recognised():
    run = run_of('timm')
    # The groups say that the buffer holds the rate.
    assert_goes_on(run, moved(run))
    assert_goes_on(run, moved(run, lr_in_momentum=True, dialect=dialects.timm))
    for dialect in (dialects.torch, dialects.stable_baselines3):
        found = problems(lambda dialect=dialect: described(run, dialect=dialect))
        assert "the groups have 'caution'" in found
        assert "timm's RMSpropTF does" in found
    del run['state']['param_groups'][0]['max_lr_snapshot']
    assert "'max_lr_snapshot', the rate" in problems(lambda: described(run))


def test_layers_of_timm_with_rates_of_their_own():
    """timm's schedulers multiply every group's rate by its lr_scale; the optimizer does not."""
    run = run_of('timm')
    run['state']['param_groups'][0] |= {'lr_scale': 0.5, 'initial_lr': RATE / 2}
    assert 'initial_lr shows' in problems(lambda: described(run))
    assert_goes_on(run, moved(run, lr_in_momentum=True, learning_rate=[RATE / 2]))


# The keys that `torch.optim.RMSprop` of these releases writes.
FIRST = {'lr', 'momentum', 'alpha', 'eps', 'centered', 'weight_decay', 'params', 'param_names'}
RELEASES = {
    '1.11': FIRST,
    '1.12': FIRST | {'foreach'},
    '1.13': FIRST | {'foreach', 'maximize', 'differentiable'},
    '2.13': FIRST | {'foreach', 'maximize', 'differentiable', 'capturable'},
}


@pytest.mark.parametrize('release', RELEASES)
def test_the_settings_of_pytorchs_releases(release: str):
    run = run_of('gradless')
    groups = run['state']['param_groups']
    assert set(groups[0]) == RELEASES['2.13']
    for group in groups:
        for key in RELEASES['2.13'] - RELEASES[release]:
            del group[key]
    if release == '1.11':
        assert 'do not show which optimizer wrote them' in problems(lambda: described(run))
        assert_goes_on(run, moved(run, frozen=[LATER], dialect=dialects.torch))
    else:
        assert_goes_on(run, moved(run, frozen=[LATER]))
        found = problems(lambda: described(run, dialect=dialects.stable_baselines3))
        assert "'foreach'" in found
        assert "dialect is for Stable-Baselines3's RMSpropTFLike" in found


def test_other_dialects_have_other_checkpoints():
    with pytest.raises(TypeError, match=r'dialect must be dialects\.torch, dialects\.timm or'):
        described(run_of('gradless'), dialect=dialects.keras)


# Learning rates.


@pytest.mark.parametrize(('case', 'ahead'), [('lambda', 0), ('lambda_early', 1)])
def test_a_scheduler_counts_its_own_steps(case: str, ahead: int):
    """`scheduler.step()` before the first update uses up the first rate."""
    run = run_of(case)

    def schedule(count: Any) -> Any:
        return RATE * (1 - (count + ahead) * (1 / END))

    np.testing.assert_allclose(run['rates']['used'], schedule(np.arange(END)), rtol=1e-12)
    # The rate that is written is the next one, or where it was set early the last one.
    assert run['rates']['used'][HALF - ahead] == run['state']['param_groups'][0]['lr']
    assert_goes_on(run, moved(run, learning_rate=schedule))
    assert_goes_on(run, moved(run, learning_rate=[schedule]))
    found = problems(lambda: moved(run, learning_rate=lambda count: schedule(count + 3)))
    assert 'delete the entry from group 0 to leave it uncompared' in found
    run['state']['param_groups'][0]['lr'] = schedule
    assert_goes_on(run, moved(run))


def test_a_run_of_torchbeast_goes_on_with_its_recipe():
    run = run_of('torchbeast')
    tx = recipes.impala_torchbeast(total_steps=recorded.TOTAL, steps_per_update=recorded.BATCH)
    params = ours(run['params'])
    state = interchange.from_torch(run['state'], tx, params, PAIRS, names=NAMES)
    assert_goes_on(run, trained(tx, params, state, recorded.SCALE))
    assert 'initial_lr shows' in problems(lambda: described(run, names=NAMES))


def test_jax_divides_integers_in_float32():
    """Even where everything else is float64, so that schedules multiply by a reciprocal."""
    assert (jnp.int32(1) / 3).dtype == jnp.float32
    assert (jnp.int32(1) * (1 / 3)).dtype == jnp.float64


def test_a_scheduled_rate_is_not_frozen_silently():
    run = run_of('lambda')
    found = problems(lambda: described(run))
    assert found.startswith('group 0: initial_lr shows that a scheduler changes lr, which is 0.007')
    assert 'pass learning_rate' in found
    tx = described(run, learning_rate=0.25)
    params = ours(run['params'])
    for _ in range(2):
        updates, _ = tx.update(params, tx.init(params), params)
        np.testing.assert_allclose(np.abs(updates['a']['bias']), 2.5, rtol=1e-4)


SCHEDULERS = ('LambdaLR', 'CosineAnnealingLR', 'OneCycleLR', 'CyclicLR', 'SWALR')


@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_what_schedulers_leave_in_a_group(scheduler: str):
    left = run_of('keys')['left']
    assert left['ReduceLROnPlateau'].size == 0  # Its rate cannot be told from a constant one.
    run = run_of('gradless')
    for group in run['state']['param_groups']:
        group |= dict.fromkeys(left[scheduler].tolist(), 0.5)
    found = problems(lambda: described(run))
    assert 'initial_lr shows' in found
    found = [1e-3, optax.constant_schedule(1e-3)]
    if scheduler not in ('OneCycleLR', 'CyclicLR'):
        described(run, learning_rate=found)
        return
    assert 'base_momentum shows that a scheduler changes momentum' in problems(
        lambda: described(run, learning_rate=found)
    )
    for group in run['state']['param_groups']:
        group['momentum'] = optax.constant_schedule(0.9)
    described(run, learning_rate=found)


def test_groups_with_rates_of_their_own_want_one_each():
    run = run_of('gradless')
    assert run['state']['param_groups'][1]['lr'] == RATE / 4
    assert 'give a list with one for each' in problems(lambda: described(run, learning_rate=0.1))
    for group in run['state']['param_groups']:
        group['initial_lr'] = RATE  # As with LambdaLR(optimizer, [f, g]).
    assert 'give a list with one for each' in problems(lambda: described(run, learning_rate=0.1))
    found = problems(lambda: described(run, learning_rate=[0.1]))
    assert found == 'learning_rate has 1 entries for 2 groups'
    with pytest.raises(TypeError, match=r"learning_rate\[1\] must be a real scalar, got 'x'"):
        described(run, learning_rate=[0.1, 'x'])
    rates = (RATE, lambda count: RATE / 4 + 0 * count)
    assert_goes_on(run, moved(run, frozen=[LATER], learning_rate=rates))


# What the pages tell PyTorch's users to write.


class Tensor:
    """As much of a parameter as the pages use."""

    def __init__(self, array: Any):
        self.array = np.asarray(array, 'f')

    def detach(self) -> np.ndarray:
        return self.array


def snippet(page: str, start: str) -> str:
    """The block of a page that begins so; it is for PyTorch, and does not run with the others."""
    blocks = (ROOT / page).read_text().split('```')[1::2]
    (found,) = (block for block in blocks if block.startswith('\n' + start))
    return found


def test_the_snippet_of_the_readme():
    shapes = {'conv.weight': (2, 1, 3, 3), 'conv.bias': (2,), 'fc.weight': (4, 3), 'fc.bias': (4,)}
    tensors = {name: Tensor(problem.wave(shape, 0.7)) for name, shape in shapes.items()}
    group = run_of('lambda')['state']['param_groups'][0]
    del group['initial_lr']
    group |= {'params': [0, 1, 2, 3], 'param_names': list(shapes)[::-1]}
    entries = {
        i: {'step': 3.0, 'square_avg': tensors[name].array ** 2}
        for i, name in enumerate(group['param_names'])
    }
    like = {
        'conv': {'kernel': jnp.zeros((3, 3, 1, 2)), 'bias': jnp.zeros(2)},
        'fc': {'kernel': jnp.zeros((3, 4)), 'bias': jnp.zeros(4)},
    }
    dictionary = {'state': entries, 'param_groups': [group]}
    place = {
        'interchange': interchange,
        'model': types.SimpleNamespace(named_parameters=tensors.items),
        'optimizer': types.SimpleNamespace(state_dict=lambda: dictionary),
        'like': like,
    }
    exec(snippet('README.md', 'pairs = '), place)
    nu = optax.tree.get_all_with_path(place['state'], 'nu')[0][1]
    np.testing.assert_array_equal(
        nu['fc']['kernel'], np.float32(place['params']['fc']['kernel']) ** 2
    )


def test_the_names_that_the_porting_page_reads_off_an_optimizer():
    """Recorded in PyTorch by the same two lines, for groups in another order than the model's."""
    tensors = {name: Tensor(array) for name, array in recorded.params().items()}
    order = run_of('reordered')['names']['found'].tolist()
    groups = [{'params': [tensors[n] for n in names]} for names in (order[:2], order[2:])]
    place = {
        'model': types.SimpleNamespace(named_parameters=tensors.items),
        'optimizer': types.SimpleNamespace(param_groups=groups),
    }
    exec(snippet('docs/porting.md', 'names = '), place)
    assert place['names'] == order


# Whose memory it is.


def test_nothing_that_was_moved_shares_memory():
    """PyTorch goes on writing into the tensors of its state, and NumPy arrays of them are views."""
    run = run_of('gradless')
    params = ours(run['params'])
    tx = described(run, frozen=[LATER])
    state = interchange.from_torch(run['state'], tx, params, PAIRS, frozen=[LATER])
    before = copy.deepcopy(jax.tree.map(np.array, (params, state)))
    for array in jax.tree.leaves((run['params'], run['state']['state'])):
        array[...] = 7.0
    jax.tree.map(np.testing.assert_array_equal, (params, state), before)
