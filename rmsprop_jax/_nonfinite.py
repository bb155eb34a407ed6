"""Skipping gradients that are infinite or NaN, and finding such statistics."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import tree_flatten_with_path
from jax.typing import ArrayLike

from rmsprop_jax._checks import (
    check_alike,
    checked_leaves,
    checked_state,
    checked_transformation,
)
from rmsprop_jax._core.edge import member, public
from rmsprop_jax._core.wrapped import (
    check_storage_is_given,
    like_state,
    map_rms_states,
    map_with_moments,
    select,
)
from rmsprop_jax._transforms import AccumulateState
from rmsprop_jax._types import by_path, canonical
from rmsprop_jax.storage._choice import Storage, check_storage
from rmsprop_jax.storage._convert import read, restated
from rmsprop_jax.storage._place import split_axes, whole_sum

Unit = Literal['step', 'leaf', 'coordinate']
_MOST = np.iinfo(np.int32).max


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`, with the names of `optax.ApplyIfFiniteState`.

    Attributes:
      total_notfinite: Leaves or coordinates skipped in all steps so far, int32 of shape (). It
        stays at its largest value instead of wrapping around.
      inner_state: The state of the wrapped transformation.
    """

    total_notfinite: ArrayLike
    inner_state: Any


@public
def skip_nonfinite(
    inner: optax.GradientTransformation,
    per: Unit = 'coordinate',
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips gradients that are infinite or NaN.

    Without this wrapper they pass through, as in Optax: a NaN stays in the second moment of its
    coordinate for good, and an infinity makes all later steps of its coordinate zero.

    Skipped entries get a zero update, without weight decay or momentum. Their state does not
    change, with two exceptions. Step counts, and thus schedules, go on. So does the sum of weights
    of a bias-corrected average, which all parameters share. The corrected average itself, the
    quotient of the two, stays. Before its first finite gradient an entry has no average, so its
    first step is up to `1 / sqrt(1 - decay)` learning rates long.

    All other entries take their step as if skipped gradients were zero. This matters only if
    `inner` couples entries or leaves, for example by clipping a norm.

    Put transformations that couple parameters, such as `optax.clip_by_global_norm`, inside: before
    this wrapper, they would spread a NaN over all parameters. Put accumulation of gradients
    outside, around this wrapper.

    Args:
      inner: The transformation to wrap.
      per: What to skip: the 'coordinate' that is not finite, the whole 'leaf' that it is in, or the
        whole 'step', counts included. The last is `optax.apply_if_finite` without a limit on
        consecutive errors.
      storage: The `storage` of `inner`, needed if its formats round. Coordinates of `factored`
        statistics cannot be skipped, but leaves can.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `SkipNonfiniteState`, or, for whole steps,
      with an `optax.ApplyIfFiniteState`. `optax.tree.get(state, 'total_notfinite')` is the number
      of skipped coordinates, leaves or steps. Under `jax.shard_map`, leaves and counts belong to
      whole arrays if `update` gets `partition_specs` (see `scale_by_rms`) or if `check_vma` is on;
      otherwise they belong to the shard.

    Raises:
      TypeError: If `per` is another word, or `storage` is not a choice of formats.
      ValueError: If `inner` accumulates gradients, if `storage` is needed and missing, or if
        coordinates of a factored moment would be skipped.

    Example:
      >>> import jax.numpy as jnp, optax, rmsprop_jax
      >>> tx = rmsprop_jax.skip_nonfinite(rmsprop_jax.rmsprop(0.1, eps=0.0))
      >>> params = jnp.zeros(3)
      >>> updates, state = tx.update(jnp.array([1.0, jnp.nan, jnp.inf]), tx.init(params))
      >>> print(updates.round(4), optax.tree.get(state, 'total_notfinite'))
      [-0.3162  0.      0.    ] 2
    """
    if per not in get_args(Unit):
        raise TypeError(f'per must be one of {", ".join(map(repr, get_args(Unit)))}, got {per!r}.')
    check_storage(storage)
    inner_ = member(checked_transformation('inner', inner))
    if per == 'step':
        return _skip_steps(inner_)

    def is_bad(g: Any, axes: tuple[str, ...]) -> jax.Array:
        bad = ~jnp.isfinite(g)
        return whole_sum(bad.any().astype(jnp.int32), axes) > 0 if per == 'leaf' else bad

    def init(params: optax.Params) -> Any:
        state = inner_.init(params)
        _check_takes_every_step(state)
        return SkipNonfiniteState(jnp.zeros([], jnp.int32), state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        before = checked_state(state, SkipNonfiniteState).inner_state
        check_storage_is_given(before, storage)
        leaves, treedef = tree_flatten_with_path(updates)
        partition = _partition(extra_args)
        axes = [split_axes(g, partition.get(canonical(path))) for path, g in leaves]
        bads = [is_bad(g, own) for (_, g), own in zip(leaves, axes, strict=True)]
        bad = treedef.unflatten(bads)
        new, after = inner_.update(_zeroed(bad, updates), before, params, **extra_args)
        carry = functools.partial(restated, storage=storage, partition=partition)
        standing = map_rms_states(carry, before, after)
        after = jax.tree.map(select, like_state(inner_, before, bad, False), standing, after)
        total = state.total_notfinite
        for x, own in zip(bads, axes, strict=True):
            more = jnp.sum(x, dtype=jnp.int32)
            total = _saturating_add(total, whole_sum(more, own if per == 'coordinate' else ()))
        return _zeroed(bad, new), SkipNonfiniteState(total, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _skip_steps(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`optax.apply_if_finite` without a limit, and for whole arrays, not one device's shares."""

    def init(params: optax.Params) -> Any:
        none = jnp.zeros([], jnp.int32)
        return optax.ApplyIfFiniteState(none, jnp.array(True), none.copy(), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        checked_state(state, optax.ApplyIfFiniteState)
        partition, finite = _partition(extra_args), jnp.array(True)
        for path, g in tree_flatten_with_path(updates)[0]:
            bad = ~jnp.isfinite(g).all()
            axes = split_axes(g, partition.get(canonical(path)))
            finite &= whole_sum(bad.astype(jnp.int32), axes) == 0

        def step() -> tuple[Any, Any]:
            return inner.update(updates, state.inner_state, params, **extra_args)

        def hold() -> tuple[Any, Any]:
            new, _ = jax.eval_shape(step)
            return optax.tree.zeros_like(new), state.inner_state

        new, after = lax.cond(finite, step, hold)
        once_more = [
            optax.safe_increment(n) for n in (state.notfinite_count, state.total_notfinite)
        ]
        return new, optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, once_more[0]),
            last_finite=finite,
            total_notfinite=jnp.where(finite, state.total_notfinite, once_more[1]),
            inner_state=after,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _partition(extra_args: Mapping[str, Any]) -> dict[Any, Any]:
    """The partition of each gradient under `jax.shard_map`, by path, if it is given."""
    return by_path(extra_args.get('partition_specs'))


def nonfinite_entries(
    tx: optax.GradientTransformation, state: Any, params: Any, storage: Storage | None = None
) -> Any:
    """Marks the entries with a statistic that is infinite or NaN, as a mask for `reset`.

    If a square overflows once, the second moment of its coordinate is infinite, and every later
    step of the coordinate is zero. This happens with every optimizer that averages squares.

    Args:
      tx: The transformation that `state` belongs to.
      state: Its state.
      params: The parameters.
      storage: The `storage` of `tx`, if it is not float32.

    Returns:
      A tree like the parameters, with a boolean array of the same shape for each parameter.

    Raises:
      TypeError: If `tx` is not a transformation, or `storage` is not a choice of formats.
      ValueError: If the state does not belong to `tx` and `params`, or is not kept in `storage`.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> tx = rmsprop_jax.rmsprop(0.1, eps=0.0)
      >>> params = jnp.zeros(2)
      >>> _, state = tx.update(jnp.array([1.0, 1e30]), tx.init(params))
      >>> updates, _ = tx.update(jnp.ones(2), state)
      >>> [round(float(u), 3) for u in updates]  # the second entry no longer moves
      [-0.229, -0.0]
      >>> broken = rmsprop_jax.nonfinite_entries(tx, state, params)
      >>> updates, _ = tx.update(jnp.ones(2), rmsprop_jax.reset(tx, state, params, broken))
      >>> [round(float(u), 3) for u in updates]
      [-0.229, -0.316]
    """
    check_storage(storage)
    checked_transformation('tx', tx)
    checked_leaves('params', params)
    check_alike('state', state, 'tx.init(params)', jax.eval_shape(tx.init, params))
    leaves, treedef = jax.tree.flatten(params)
    marks = [jnp.zeros(jnp.shape(p), bool) for p in leaves]

    def collect(moments: Any, numbers: Any) -> Any:
        def leaf(number: int, part: Any) -> None:
            for x in jax.tree.leaves(part):
                marks[number] |= _entries(~jnp.isfinite(x), jnp.shape(leaves[number]))

        map_with_moments(leaf, numbers, moments)
        return moments

    numbers = treedef.unflatten(range(len(leaves)))
    optax.tree.map_params(tx, collect, read(state, storage), numbers, is_leaf=lambda _: True)
    return treedef.unflatten(marks)


def _entries(bad: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Marks of a statistic's entries, turned into marks of a parameter of this shape."""
    if bad.shape == shape:
        return bad
    # Complex numbers as pairs of reals have statistics with one more axis, of two. Statistics of
    # other shapes do not have one entry for each entry of the parameter.
    return bad.any(-1) if bad.shape == (*shape, 2) else bad.any()


def _zeroed(bad: Any, tree: Any) -> Any:
    return jax.tree.map(lambda b, x: jnp.where(b, 0, x), bad, tree)


def _saturating_add(total: Any, more: jax.Array) -> jax.Array:
    return jnp.where(total > _MOST - more, _MOST, total + more)


def _check_takes_every_step(state: Any) -> None:
    accumulating = (AccumulateState, optax.MultiStepsState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, accumulating))
    if any(isinstance(node, accumulating) for node in nodes):
        raise ValueError(
            'inner accumulates gradients, and a skipped entry would keep its sum and use it twice: '
            'wrap the transformation inside, and accumulate around skip_nonfinite.'
        )
