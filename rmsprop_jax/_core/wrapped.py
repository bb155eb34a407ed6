"""Finding and mapping our states inside wrappers and chains, and matching them with parameters."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

from rmsprop_jax._types import KeyPath, RmsState
from rmsprop_jax.storage._choice import Storage


def map_with_moments(function: Callable[..., Any], tree: Any, moments: Any, *others: Any) -> Any:
    """Applies `function` to each leaf of `tree` and to what is stored for it in `moments`.

    A branch that a mask has left out is a single `optax.MaskedNode`, which stays.

    Args:
      function: Takes a leaf, the part of `moments` in its place, and the same leaf of `others`.
      tree: A tree like the parameters.
      moments: A tree of which `tree` is a prefix, except for branches that are masked out.
      others: Trees like `tree`.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    nodes = tree_flatten_with_path(moments, is_leaf=is_masked)[0]
    masked = {path for path, node in nodes if is_masked(node)}

    def leaf(path: KeyPath, x: Any, part: Any, *same: Any) -> Any:
        return part if path in masked else function(x, part, *same)

    return tree_map_with_path(
        leaf,
        tree,
        moments,
        *others,
        is_leaf=lambda path, _: path in masked,
        is_leaf_takes_path=True,
    )


def like_state(tx: optax.GradientTransformation, state: Any, tree: Any, elsewhere: Any) -> Any:
    """Broadcasts a tree shaped like the parameters over `state`; every other leaf gets
    `elsewhere`."""

    def moments_of(x: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: x, part)

    return optax.tree.map_params(
        tx,
        lambda moments, tree: map_with_moments(moments_of, tree, moments),
        state,
        tree,
        transform_non_params=lambda _: elsewhere,
        # Pass whole trees, so that branches masked out by wrappers can be skipped.
        is_leaf=lambda _: True,
    )


def select(mark: Any, new: Any, old: Any) -> Any:
    """`new` where `mark` is true, else `old`.

    Args:
      mark: A bool, or a boolean array of shape () or of the parameter's shape.
      new: A statistic of the parameter.
      old: The same statistic with other values.

    Raises:
      ValueError: If a mark of the parameter's shape does not determine entries of the statistic.
    """
    if isinstance(mark, bool):
        return new if mark else old
    if jnp.ndim(mark) and jnp.shape(mark) != jnp.shape(new):
        # Complex numbers as pairs of reals have statistics with one more axis, of two.
        if jnp.shape(new) != (*jnp.shape(mark), 2):
            raise ValueError(
                f'a statistic of shape {jnp.shape(new)} does not have one entry for each entry of '
                f'its parameter of shape {jnp.shape(mark)}: like factored statistics, it can only '
                'be selected as a whole.'
            )
        mark = jnp.expand_dims(mark, -1)
    return jnp.where(mark, new, old)


def as_pure(tree: Any) -> Any:
    """A tree with arrays in the place of the variables of Flax NNX.

    Whoever has such variables has imported Flax, which this package does not need.
    """
    nnx = sys.modules.get('flax.nnx')
    if nnx is None:
        return tree
    if hasattr(nnx, 'as_pure'):
        return nnx.as_pure(tree)

    # Flax 0.11 does not have it.
    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    return jax.tree.map(
        lambda x: as_pure(x.value) if is_variable(x) else x, tree, is_leaf=is_variable
    )


def rms_states(state: Any) -> list[RmsState]:
    """The `RmsState`s anywhere in an optimizer's state."""
    parts = jax.tree.leaves(state, is_leaf=_is_rms_state)
    return [part for part in parts if _is_rms_state(part)]


def map_rms_states(function: Callable[..., Any], state: Any, *others: Any) -> Any:
    """Replaces each `RmsState` in `state` by `function` of it and of its counterparts in
    `others`."""
    nodes = zip(*map(rms_states, (state, *others)), strict=True)
    return jax.tree.map(
        lambda node: function(*next(nodes)) if _is_rms_state(node) else node,
        state,
        is_leaf=_is_rms_state,
    )


def check_storage_is_given(state: Any, storage: Storage | None) -> None:
    """Raises if a state has units but the storage is not given."""
    if storage is None and any(node.unit is not None for node in rms_states(state)):
        raise ValueError(
            'give the storage of the transformation: its state is kept in compact formats.'
        )


def _is_rms_state(node: Any) -> bool:
    return isinstance(node, RmsState)
