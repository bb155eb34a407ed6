"""Every transformation refuses states, parameters and gradients that do not go with its own."""

import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case

import rmsprop_jax
from rmsprop_jax import diagnostics, sharding

PARAMS = {'dense': {'kernel': jnp.full((4, 3), 0.5), 'bias': jnp.full(3, 0.25)}}
OTHERS = {'dense': {'kernel': jnp.ones((4, 3)), 'scale': jnp.ones(3)}}
TURNED = {'dense': {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(3)}}
KERNEL = "['dense']['kernel']"

INNER = rmsprop_jax.rmsprop(0.1, momentum=0.9)


def zero1():
    mesh = jax.make_mesh((1,), ('data',))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return sharding.zero1(INNER, PARAMS, place)


WRAPPERS = (
    Case(
        'measured',
        lambda: diagnostics.measured(rmsprop_jax.rmsprop(0.1)),
        ('nu',),
        needs_params=True,
    ),
    Case(
        'skip_nonfinite-step',
        lambda: rmsprop_jax.skip_nonfinite(rmsprop_jax.rmsprop(0.1, lambda count: 0.9), 'step'),
        ('nu',),
    ),
    Case('zero1', zero1, ('nu', 'trace')),
)
each_way = pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
each_case = pytest.mark.parametrize('case', [*CASES, *WRAPPERS], ids=lambda case: case.name)


def refusal(tx, jit, *arguments):
    """The message of the error that an update ends in, which must be raised by ours."""
    with pytest.raises((TypeError, ValueError)) as raised:
        (jax.jit(tx.update) if jit else tx.update)(*arguments)
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert 'rmsprop_jax' in Path(last.filename).parts, raised.value
    return str(raised.value)


def with_a_foreign_node(state, own):
    """The state with one of its records after another replaced by a record of Optax's."""
    if isinstance(state, tuple) and jax.tree.leaves(state):
        if hasattr(state, '_fields') and type(state) not in own:
            yield optax.ScaleByRmsState(PARAMS)
        for i, part in enumerate(state):
            for changed in with_a_foreign_node(part, own):
                rest = [*state[:i], changed, *state[i + 1 :]]
                yield type(state)(*rest) if hasattr(state, '_fields') else tuple(rest)


@each_way
@each_case
def test_foreign_states(case, jit):
    if not case.moments:
        pytest.skip('it keeps nothing, and looks at no state')
    tx = case.tx
    # What Optax's own wrapper does with a state is its own affair, and nobody else's tuple.
    is_optax = case.name.startswith('optax.')
    own = {optax.InjectStatefulHyperparamsState} if is_optax else set()
    states = list(with_a_foreign_node(tx.init(PARAMS), own))
    if not is_optax:
        states += [None, 3, (), optax.EmptyState(), optax.rmsprop(0.1, momentum=0.9).init(PARAMS)]
    assert len(states) >= 1
    for state in states:
        assert 'state' in refusal(tx, jit, PARAMS, state, PARAMS)


@each_way
@each_case
def test_states_of_other_parameters(case, jit):
    tx = case.tx
    if not case.moments:
        pytest.skip('it keeps nothing')
    # Told of its parameters, zero1 makes no state of others; that of the optimizer in it is like
    # its own.
    init = INNER.init if case.name == 'zero1' else tx.init
    assert "['dense']['scale']" in refusal(tx, jit, PARAMS, init(OTHERS), PARAMS)
    message = refusal(tx, jit, PARAMS, init(TURNED), PARAMS)
    assert KERNEL in message
    assert '(4, 3)' in message


@each_way
@pytest.mark.parametrize(
    'case', [case for case in [*CASES, *WRAPPERS] if case.needs_params], ids=lambda case: case.name
)
def test_parameters_unlike_the_gradients(case, jit):
    tx = case.tx
    state = tx.init(PARAMS)
    assert 'needs params: call update(updates, state, params)' in refusal(tx, jit, PARAMS, state)
    message = refusal(tx, jit, PARAMS, state, OTHERS)
    assert 'the structure of params does not match that of updates' in message
    assert "only in params: ['dense']['scale']" in message
    message = refusal(tx, jit, PARAMS, state, TURNED)
    assert f'params{KERNEL} has shape (3, 4), but updates has (4, 3) there' in message
    if not jit:
        words = {'dense': {'kernel': 'x', 'bias': jnp.ones(3)}}
        assert f'params{KERNEL} is a str, not an array' in refusal(tx, jit, PARAMS, state, words)


@each_way
@each_case
def test_gradients_that_do_not_fit(case, jit):
    tx = case.tx
    state = tx.init(PARAMS)
    integers = {'dense': {'kernel': jnp.ones((4, 3), int), 'bias': jnp.ones(3)}}
    assert f'updates{KERNEL} has dtype int' in refusal(tx, jit, integers, state, PARAMS)
    if not jit:
        for leaf, kind in (('x', 'is a str'), (np.array('x'), 'has dtype <U1')):
            words = {'dense': {'kernel': leaf, 'bias': jnp.ones(3)}}
            assert f'updates{KERNEL} {kind}' in refusal(tx, jit, words, state, PARAMS)
    if not case.moments:
        return
    assert "['dense']['scale']" in refusal(tx, jit, OTHERS, state, PARAMS)
    message = refusal(tx, jit, TURNED, state, PARAMS)
    assert KERNEL in message
    assert '(3, 4)' in message
