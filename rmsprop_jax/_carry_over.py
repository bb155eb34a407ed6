"""`carry_over`: optimizer state for a parameter tree that has gained, lost or resized leaves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, tree_flatten_with_path, tree_map_with_path

from rmsprop_jax._checks import check_alike, checked_flag, checked_leaves, checked_transformation
from rmsprop_jax._core.wrapped import as_pure, like_state, map_rms_states
from rmsprop_jax._reset import encoded, fresh, in_units_of, with_weight
from rmsprop_jax._types import KeyPath, RmsState, by_path, canonical, path_name
from rmsprop_jax.storage._choice import Storage, check_storage
from rmsprop_jax.storage._convert import read
from rmsprop_jax.storage._formats import Means, as_factors
from rmsprop_jax.storage._place import unshared


class CarriedOver(NamedTuple):
    """What `carry_over` did with each parameter, by paths such as `dense/kernel`; `str` lists them.

    Attributes:
      kept: All statistics are the old ones.
      partly: Some entries or statistics are the old ones; the others are fresh.
      fresh: All statistics come from `tx.init`.
      dropped: Old parameters that are not in the new tree.
      stateless: New parameters for which the optimizer stores nothing.
    """

    kept: tuple[str, ...]
    partly: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    stateless: tuple[str, ...]

    def __str__(self) -> str:
        """One line for each parameter."""
        groups = self._asdict().items()
        return '\n'.join(f'{kind:<9}  {name}' for kind, names in groups for name in names)


def carry_over(
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    new_params: Any,
    *,
    new_tx: optax.GradientTransformation | None = None,
    resize: bool = False,
    storage: Storage | None = None,
) -> tuple[Any, CarriedOver]:
    """Moves the state of an optimizer to a changed parameter tree.

    Parameters are matched by their paths. A parameter whose path and shape have not changed keeps
    its statistics bit for bit, in every storage format and through chains, masks, partitions and
    other wrappers. A new parameter gets the statistics of `tx.init`; the statistics of a removed
    one are dropped. Step counts, schedules and injected hyperparameters continue.

    With `resize`, a parameter that has another shape but the same number of axes keeps the
    statistics of the entries that the old and the new shape share::

        nu_new[:m, :n] = nu[:m, :n]        with m, n the smaller length along each axis

    so an embedding that grows by rows keeps its old rows. Without `resize` it starts fresh.

    Args:
      tx: The transformation that `state` belongs to.
      state: Its state; may be the state of an `nnx.Optimizer`.
      params: The old parameters, or their shapes (`jax.ShapeDtypeStruct`).
      new_params: The changed parameters. They must be arrays if `tx` averages parameters, since a
        new average starts from them.
      new_tx: The same optimizer made for the new tree. Needed if `tx` was given trees of the old
        structure, such as masks, labels or shardings.
      resize: Whether a parameter with a new shape keeps the overlapping entries.
      storage: The `storage` of `tx`. Needed if its statistics use formats that round; with
        `resize`, for every format.

    Returns:
      The new state, as plain arrays without `nnx` variables, and a `CarriedOver`, whose `str` says
      what was done with each parameter.

    A bias-corrected state has one sum of weights for all parameters that share it. A new parameter
    that shares it with old ones therefore has an uncorrected start, as in `reset`: its first step
    is up to `1 / sqrt(1 - decay)` learning rates long. A parameter that changes its group under
    `optax.partition` starts fresh. If `optax.MultiSteps` is in the middle of an accumulation, the
    sum of a new parameter starts at zero.

    Raises:
      TypeError: If `tx` or `new_tx` is not a transformation, `resize` is not a boolean, or
        parameters are not arrays.
      ValueError: If the state does not belong to `tx` and `params`, or `storage` is missing.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> tx = rmsprop_jax.rmsprop(0.1)
      >>> params = {'body': jnp.ones(2), 'embedding': jnp.ones((2, 2)), 'head': jnp.ones(2)}
      >>> _, state = tx.update(params, tx.init(params))
      >>> grown = {'body': jnp.ones(2), 'embedding': jnp.ones((3, 2)), 'new_head': jnp.ones(5)}
      >>> state, report = rmsprop_jax.carry_over(tx, state, params, grown, resize=True)
      >>> print(report)
      kept       body
      partly     embedding
      fresh      new_head
      dropped    head
      >>> print(state[0].nu['embedding'])
      [[0.1 0.1]
       [0.1 0.1]
       [0.  0. ]]
    """
    checked_transformation('tx', tx)
    after_tx = tx if new_tx is None else checked_transformation('new_tx', new_tx)
    resize = checked_flag('resize', resize)
    check_storage(storage)
    state, params, new_params = map(as_pure, (state, params, new_params))
    checked_leaves('params', params)
    checked_leaves('new_params', new_params)
    like = jax.eval_shape(tx.init, params)
    state = _with_means(state, like)
    check_alike('state', state, 'tx.init(params)', like)
    old = _by_path(state)
    start = fresh(after_tx, new_params)
    running = _with_units(start, old)
    start = in_units_of(running, start, new_params, storage)
    names = [path_name(path) for path, _ in tree_flatten_with_path(new_params)[0]]
    numbers = jax.tree.unflatten(jax.tree.structure(new_params), range(len(names)))
    owners = _by_path(like_state(after_tx, start, numbers, -1))
    stored = {path: (old.get(path), x) for path, x in _by_path(start).items()}
    outcomes = {path: 'kept' if _is_alike(*pair) else 'fresh' for path, pair in stored.items()}
    overlaps: dict[KeyPath, Any] = {}
    if resize:
        decoded = read(start, storage)
        before, after = _by_path(read(state, storage)), _by_path(decoded)
        for path, outcome in outcomes.items():
            if outcome == 'fresh' and _can_overlap(before.get(path), after[path]):
                outcomes[path] = 'partly'

        def merged(path: KeyPath, x: Any) -> Any:
            path = canonical(path)
            return _overlap(before[path], x) if outcomes[path] == 'partly' else x

        decoded = tree_map_with_path(merged, decoded)
        overlaps = _by_path(encoded(decoded, running, new_params, storage))

    def is_fresh(path: KeyPath, _: Any) -> bool:
        return outcomes[canonical(path)] == 'fresh'

    marks = map_rms_states(with_weight, tree_map_with_path(is_fresh, start, is_leaf=_is_means))

    def leaf(path: KeyPath, x: Any, starts_again: bool) -> Any:
        path = canonical(path)
        if starts_again:
            return x
        return overlaps[path] if outcomes[path] == 'partly' else old[path]

    found = tree_map_with_path(leaf, start, marks, is_leaf=_is_means)
    told: dict[int, set[str]] = {number: set() for number in range(len(names))}
    for path, owner in owners.items():
        told.get(jax.tree.leaves(owner)[0], set()).add(outcomes[path])
    kinds = [
        next(iter(x)) if len(x) == 1 else 'partly' if x else 'stateless' for x in told.values()
    ]
    listed = {
        kind: tuple(name for name, own in zip(names, kinds, strict=True) if own == kind)
        for kind in ('kept', 'partly', 'fresh', 'stateless')
    }
    gone = [path_name(path) for path in by_path(params) if path not in by_path(new_params)]
    return unshared(found, state, params, new_params), CarriedOver(dropped=tuple(gone), **listed)


def _is_alike(old: Any, new: Any) -> bool:
    """Whether two parts of a state have the same structure, shapes and dtypes."""

    def described(x: Any) -> Any:
        return jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x))), x)

    return old is not None and described(old) == described(new)


def _can_overlap(old: Any, new: Any) -> bool:
    return (
        old is not None
        and jnp.ndim(old) == jnp.ndim(new)
        and jnp.iscomplexobj(old) == jnp.iscomplexobj(new)
    )


def _overlap(old: Any, new: Any) -> Any:
    """`new` with the entries of `old` in the corner that both share."""
    corner = tuple(slice(min(lengths)) for lengths in zip(old.shape, new.shape, strict=True))
    return new.at[corner].set(old[corner].astype(new.dtype))


def _is_means(x: Any) -> bool:
    return isinstance(x, Means)


def _with_means(state: Any, like: Any) -> Any:
    """`state` with means where `like` has them and Flax NNX has made a mapping of them."""
    kinds = {path: type(x) for path, x in _by_path(like).items() if _is_means(x)}

    return tree_map_with_path(
        lambda path, x: as_factors(x, kinds.get(canonical(path))),
        state,
        is_leaf=lambda path, _: canonical(path) in kinds,
        is_leaf_takes_path=True,
    )


def _by_path(tree: Any) -> dict[KeyPath, Any]:
    """The leaves of a state by canonical path; the means of a parameter are one leaf."""
    leaves = tree_flatten_with_path(tree, is_leaf=_is_means)[0]
    return {canonical(path): leaf for path, leaf in leaves}


def _with_units(start: Any, old: dict[KeyPath, Any]) -> Any:
    """`start` with the units of the same moments in the old state."""

    def node(path: KeyPath, part: Any) -> Any:
        if not isinstance(part, RmsState):
            return part
        return part._replace(unit=old.get((*path, GetAttrKey('unit')), part.unit))

    return tree_map_with_path(node, start, is_leaf=lambda x: isinstance(x, RmsState))
