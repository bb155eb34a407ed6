"""Masks and labels say the same of a tree of any kind, whatever its leaves and its class."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import masking
from jax.tree_util import Partial

import rmsprop_jax
from rmsprop_jax import diagnostics, dialects, interchange, recipes

pytestmark = pytest.mark.extended

LEAVES = {'kernel': jnp.arange(1.0, 7.0).reshape(3, 2), 'bias': jnp.array([1.0, -2.0])}


class Layer(eqx.Module):
    """Parameters that can be called, as layers of Equinox can."""

    kernel: Any
    bias: Any

    def __call__(self, x):
        return x @ self.kernel + self.bias


def layer(tree: dict) -> Layer:
    return Layer(tree['kernel'], tree['bias'])


def apply(x, *, kernel, bias):
    return x @ kernel + bias


def partial(tree: dict) -> Partial:
    return Partial(apply, **tree)


def by_rank(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


HOMES = {'Equinox': layer, 'Partial': partial}
DECAYING = {
    'rmsprop': lambda mask: rmsprop_jax.rmsprop(0.1, weight_decay=0.5, mask=mask),
    **masking(0.1, 0.5),
    'timm': lambda mask: dialects.timm(
        0.1, weight_decay=0.5, decoupled_decay=True, corrected_weight_decay=True, mask=mask
    ),
    'inject_hyperparams': lambda mask: rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(
        0.1, weight_decay=0.5, mask=mask
    ),
    'mnasnet': lambda mask: recipes.mnasnet(steps_per_epoch=2, batch_size=8, mask=mask),
}


def two_steps(tx, params):
    """Updates of two steps, of which the second leaves the first row of each leaf alone."""
    state = tx.init(params)
    first, state = tx.update(params, state, params)
    rest = jax.tree.map(lambda p: p.at[0].set(0.0), params)
    return jax.tree.leaves((first, tx.update(rest, state, params)[0]))


@pytest.mark.parametrize('home', HOMES.values(), ids=HOMES)
@pytest.mark.parametrize('given', ['function', 'tree'])
@pytest.mark.parametrize('make', DECAYING.values(), ids=DECAYING)
def test_a_tree_that_can_be_called_is_masked_like_a_dictionary(make, given, home):
    expected = two_steps(make(by_rank), LEAVES)
    params = home(LEAVES)
    got = two_steps(make(by_rank if given == 'function' else by_rank(params)), params)
    for one, other in zip(sorted(got, key=order), sorted(expected, key=order), strict=True):
        np.testing.assert_array_equal(one, other)


def order(x):
    """The homes hold the same leaves in another order."""
    return (x.ndim, *np.ravel(x).tolist())


@pytest.mark.parametrize('home', HOMES.values(), ids=HOMES)
def test_reset_takes_a_mask_that_can_be_called(home):
    params = home(LEAVES)
    tx = rmsprop_jax.rmsprop(0.1)
    _, state = tx.update(
        home({'kernel': LEAVES['kernel'] * 1e30, 'bias': LEAVES['bias']}), tx.init(params)
    )
    broken = rmsprop_jax.nonfinite_entries(tx, state, params)
    mended = rmsprop_jax.reset(tx, state, params, broken)
    kernel, bias = sorted(jax.tree.leaves(mended[0].nu), key=jnp.ndim, reverse=True)
    np.testing.assert_array_equal(kernel, jnp.zeros((3, 2)))
    np.testing.assert_allclose(bias, 0.1 * LEAVES['bias'] ** 2, rtol=1e-6)


@pytest.mark.parametrize('home', HOMES.values(), ids=HOMES)
def test_labels_may_be_callable_trees(home):
    params = home(LEAVES)
    labels = home({'kernel': 'matrix', 'bias': 'vector'})
    ratios = diagnostics.update_ratios(params, params, labels)
    assert ratios.keys() == {'matrix', 'vector'}
    assert all(float(ratio) == 1 for ratio in ratios.values())


@pytest.mark.parametrize('home', HOMES.values(), ids=HOMES)
def test_groups_of_a_callable_tree(home):
    params = home(LEAVES)
    paths = [
        jax.tree_util.keystr(p, simple=True, separator='/')
        for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    pairs = [interchange.Pair(f'w{i}', path) for i, path in enumerate(paths)]
    group = {
        'lr': 0.1,
        'alpha': 0.9,
        'eps': 1e-8,
        'weight_decay': 0,
        'momentum': 0,
        'centered': False,
        'maximize': False,
    }
    groups = [{'params': [0], **group}, {'params': [1], **group, 'lr': 0.0}]
    state_dict = {'state': {}, 'param_groups': groups}
    tx = interchange.torch_optimizer(state_dict, params, pairs, names=['w0', 'w1'])
    moved, still = jax.tree.leaves(tx.update(params, tx.init(params), params)[0])
    assert jnp.all(moved != 0)
    assert jnp.all(still == 0)


def test_what_a_function_returns_is_never_called():
    tx = rmsprop_jax.rmsprop(0.1, weight_decay=0.5, mask=lambda params: by_rank)
    with pytest.raises(TypeError, match='mask must return a tree of booleans, but returned a func'):
        tx.update(LEAVES, tx.init(LEAVES), LEAVES)


def test_masks_see_complex_arrays_as_the_user_has_them():
    """PyTorch keeps two real numbers for a complex one, but a vector of them has one axis."""
    params = {'kernel': jnp.ones((3, 2), jnp.complex64), 'bias': jnp.ones(2, jnp.complex64)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = dialects.torch(0.1, weight_decay=0.5, mask=by_rank)
    updates, _ = tx.update(zero, tx.init(params), params)
    assert jnp.all(updates['bias'] == 0)
    assert jnp.all(updates['kernel'].real < 0)
    seen = []
    tx = dialects.torch(
        0.1, weight_decay=0.5, mask=lambda tree: seen.append(jax.tree.map(jnp.shape, tree)) or True
    )
    tx.update(zero, tx.init(params), params)
    assert all(shapes == {'kernel': (3, 2), 'bias': (2,)} for shapes in seen)
    assert optax.tree.get(tx.init(params), 'nu')['bias'].shape == (2, 2)
