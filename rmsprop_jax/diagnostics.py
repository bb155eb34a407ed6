"""Measurements of optimizer steps: how long they are, what decides that, and what goes wrong.

`measured` wraps an optimizer and keeps the measurements of its last step in its state; `read` gives
them names. The functions that measure can be called by themselves, too, in jit or out of it. What
nobody measures costs nothing: no other module of the package knows of this one.

Measurements are taken of groups of parameters, in float32, and have no derivative.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr, tree_map_with_path
from jax.typing import ArrayLike

from rmsprop_jax._checks import (
    broadcast_prefix,
    check_alike,
    checked_flag,
    checked_leaves,
    checked_params,
    checked_state,
    checked_steps,
    checked_transformation,
    checked_updates,
    is_function,
)
from rmsprop_jax._core.programs import marked_values
from rmsprop_jax._core.wrapped import as_pure, rms_states
from rmsprop_jax._quantiles import as_float32, checked_quantiles, count_true, whole_size
from rmsprop_jax._quantiles import quantiles as quantiles_of
from rmsprop_jax._types import (
    Hyperparameter,
    KeyPath,
    ScalarOrSchedule,
    by_path,
    canonical,
    cast,
    path_name,
)
from rmsprop_jax.storage._choice import Storage, check_storage
from rmsprop_jax.storage._convert import read as decoded
from rmsprop_jax.storage._convert import stored_leaves
from rmsprop_jax.storage._place import split_axes, whole_sum

__all__ = [
    'MeasuredState',
    'Measurements',
    'by_depth',
    'epsilon_shares',
    'learning_rates',
    'measured',
    'nonfinite_counts',
    'read',
    'saturated_shares',
    'stalled_shares',
    'step_sizes',
    'update_ratios',
]
__dir__ = __all__.copy

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Labels = Any
Leaves = Iterable[tuple[KeyPath, Any]]


def by_depth(depth: int) -> Callable[[Any], Any]:
    """Labels that group parameters by the first names of their paths, such as those of layers.

    Args:
      depth: How many names.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics
      >>> params = {'dense': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}
      >>> diagnostics.by_depth(1)(params)
      {'dense': {'bias': 'dense', 'kernel': 'dense'}}
    """
    depth = checked_steps('depth', depth, least=1)
    return lambda params: tree_map_with_path(
        lambda path, _: path_name(canonical(path)[:depth]), params
    )


def learning_rates(tx: Any, state: Any, params: Any, **extra_args: Any) -> dict[str, jax.Array]:
    """The learning rates of the next step.

    They are read where the step uses them, in any optimizer of this package: whether its rate is a
    constant, a schedule or a number in the state of `inject_hyperparams`, and within chains,
    `optax.masked`, `optax.partition`, `optax.MultiSteps` and other wrappers. The step is traced,
    but only the rates are computed. It may be called within jit.

    Args:
      tx: The optimizer.
      state: Its state, also that of an `nnx.Optimizer`: `optimizer.opt_state`.
      params: The parameters.
      extra_args: What `tx.update` needs besides, such as `value` for `reduce_on_plateau`.

    Returns:
      By path of the parameter, of shape (), in the unit of the parameter. A rate that is a Python
      number has the default floating dtype. Parameters that no optimizer of this package steps are
      left out. What Optax does to updates afterwards, as `optax.scale` does, is not in it.

    Raises:
      TypeError: For a `tx` that is not a transformation, or parameters that are not arrays.
      ValueError: If there is no learning rate of this package, as in
        `optax.chain(rmsprop_jax.scale_by_rms(), optax.scale(-0.1))`, or if a parameter has two.

    Example:
      >>> import jax.numpy as jnp, optax, rmsprop_jax
      >>> from rmsprop_jax import diagnostics
      >>> schedule = optax.linear_schedule(0.5, 0.0, 4)
      >>> tx = optax.chain(optax.clip(1.0), rmsprop_jax.rmsprop(schedule))
      >>> params = {'w': jnp.ones(2)}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     print(diagnostics.learning_rates(tx, state, params)['w'])
      ...     _, state = tx.update(params, state, params)
      0.5
      0.375
      0.25
    """
    checked_transformation('tx', tx)
    state, params = as_pure(state), as_pure(params)
    checked_leaves('params', params)
    paths = {keystr(path): path_name(path) for path in by_path(params)}

    def step(state: Any, params: Any) -> Any:
        # No rate depends on the gradients, which have these shapes and dtypes.
        return tx.update(params, state, params, **extra_args)

    found: dict[str, jax.Array] = {}
    for path, rate in marked_values(step, state, params):
        if path in found:
            raise ValueError(f'params{path} has more than one learning rate in tx.')
        found[path] = rate
    if not found:
        raise ValueError('tx has no learning rate that an optimizer of this package uses.')
    return {name: found[path] for path, name in paths.items() if path in found}


def step_sizes(
    updates: Any, labels: Labels = None, quantiles: Sequence[float] = QUANTILES
) -> dict[str, jax.Array]:
    """Quantiles of the size of the step that each entry of the parameters takes.

    ::

        s_q = the ceil(q n)-th smallest of the |u_i| of the group, n their number

    This is the effective step size of Kingma and Ba: for RMSProp without momentum at most
    `learning_rate / sqrt(1 - decay)`, and near `learning_rate` where gradients are steady. No entry
    is moved or copied to find it: 31 times all entries of a group are compared with a guess, so
    that arrays of any size may stay sharded over any mesh.

    Args:
      updates: What is added to the parameters, in their unit.
      labels: As for `measured`.
      quantiles: The shares q, in [0, 1].

    Returns:
      By group, float32 of shape (quantiles,), in the unit of the parameter. NaN counts as larger
      than any number. Zero for a group without entries.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics
      >>> updates = {'w': jnp.array([0.1, -0.3, 0.2, -0.4])}
      >>> print(diagnostics.step_sizes(updates, quantiles=(0.25, 0.5, 1.0))['w'])
      [0.1 0.2 0.4]

    Source: Kingma and Ba, Adam, arXiv:1412.6980, section 2.1. Quantiles are NumPy's of the method
    'inverted_cdf'.
    """
    shares = checked_quantiles(quantiles)
    grouped = _grouped(_groups(updates, labels), _leaves('updates', updates))
    return {name: quantiles_of(name, leaves, shares) for name, leaves in grouped.items()}


def update_ratios(updates: Any, params: Any, labels: Labels = None) -> dict[str, jax.Array]:
    """The length of the step over that of the parameters.

    ::

        r = sqrt(sum |u_i|^2) / sqrt(sum |p_i|^2)        over the entries of the group

    Args:
      updates: What is added to the parameters.
      params: The parameters before that.
      labels: As for `measured`.

    Returns:
      By group, float32 of shape (), without unit. Infinity where only the parameters are zero, zero
      where updates are zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics
      >>> params = {'w': jnp.array([3.0, -4.0])}
      >>> ratios = diagnostics.update_ratios({'w': jnp.array([0.0, 0.005])}, params)
      >>> print(ratios['w'].round(6))
      0.001
    """
    groups = _groups(params, labels)
    lengths = [
        {name: _length(leaves) for name, leaves in _grouped(groups, found).items()}
        for found in (_leaves('updates', updates), _leaves('params', params))
    ]

    def ratio(step: jax.Array, size: jax.Array) -> jax.Array:
        return jnp.where(step == 0, 0, step / jnp.where(step == 0, 1, size))

    return {name: ratio(lengths[0][name], lengths[1][name]) for name in lengths[0]}


def epsilon_shares(
    state: Any,
    params: Any,
    eps: ScalarOrSchedule,
    eps_in_sqrt: bool = True,
    *,
    storage: Storage | None = None,
    labels: Labels = None,
) -> dict[str, jax.Array]:
    """The share of entries for which epsilon is more than half of what gradients are divided by.

    ::

        share of  nu_i < eps           with eps_in_sqrt, else of  sqrt(nu_i) < eps

    with the variance in the place of `nu` where centered, and after bias correction. Such entries
    take steps in proportion to their gradient, as under SGD with the learning rate
    `learning_rate / sqrt(eps)`, or `learning_rate / eps`. Under the usual small epsilon they are
    those whose gradient has been zero; under the large one of some recipes they are most.

    Args:
      state: The state after the step, of an optimizer of this package, by itself or within chains
        and wrappers.
      params: The parameters it belongs to.
      eps: What the optimizer was given: a number, a scalar array or a schedule.
      eps_in_sqrt: What the optimizer was given; False for `dialects.torch`.
      storage: What the optimizer was given.
      labels: As for `measured`.

    Returns:
      By group, float32 of shape (). Zero for a group without second moments.

    Raises:
      ValueError: For a state without second moments, or with moments of other parameters.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import diagnostics
      >>> tx = rmsprop_jax.rmsprop(0.1, decay=0.5, eps=1e-2)
      >>> params = {'w': jnp.zeros(4)}
      >>> _, state = tx.update({'w': jnp.array([0.0, 0.1, 0.2, 1.0])}, tx.init(params))
      >>> print(diagnostics.epsilon_shares(state, params, eps=1e-2)['w'])
      0.5
    """
    eps_, eps_in_sqrt = Hyperparameter('eps', eps), checked_flag('eps_in_sqrt', eps_in_sqrt)
    nodes = rms_states(decoded(state, storage))
    if not nodes:
        raise ValueError('the state has no second moment that an epsilon could be added to.')
    masks = []
    for node in nodes:
        # Epsilon was that of the step before the count went on.
        eps = eps_.at(node.count - 1)
        for path, moment in _leaves('state', node.var if node.nu is None else node.nu):
            if node.weight is not None:
                moment = moment / node.weight.astype(moment.dtype)
            root = moment if eps_in_sqrt else jnp.sqrt(moment)
            masks.append((path, root < cast(eps, root.dtype)))
    return _shares(_groups(params, labels), masks)


def saturated_shares(
    state: Any, params: Any, storage: Storage | None, labels: Labels = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The shares of entries at the lower and at the upper end of what their format can hold.

    `storage.saturation`, added up over the statistics of a group that have such ends.

    Args:
      state: The state of an optimizer of this package, by itself or within chains and wrappers.
      params: The parameters it belongs to.
      storage: What the optimizer was given.
      labels: As for `measured`.

    Returns:
      Lower and upper shares by group, float32 of shape (). Zero for a group without such ends.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import diagnostics, storage
      >>> tx = rmsprop_jax.scale_by_rms(storage=storage.uint8())
      >>> params = {'kernel': jnp.ones((64, 64))}
      >>> _, state = tx.update({'kernel': 1e-13 * params['kernel']}, tx.init(params))
      >>> low, high = diagnostics.saturated_shares(state, params, storage.uint8())
      >>> print(low['kernel'], high['kernel'])
      1.0 0.0
    """
    kept = [leaf for leaf in stored_leaves(state, storage) if leaf.format.smallest > 0]
    groups = _groups(params, labels)
    low, high = ([(leaf.path, leaf.ends()[end]) for leaf in kept] for end in (0, 1))
    return _shares(groups, low), _shares(groups, high)


def stalled_shares(
    before: Any, after: Any, gradients: Any, storage: Storage | None, labels: Labels = None
) -> dict[str, jax.Array]:
    """The share of compact entries that a step left as they were though their gradient was not
    zero.

    Formats of this package round at random: with a slow decay most entries stay at any one step, a
    few move by more than their due, and averages are right. Then this is steadily below one. It is
    one at step after step where nothing moves at all any more, such as below the lower end of a
    format, or where somebody rounds to the nearest.

    Args:
      before: The state before the step, of an optimizer of this package, by itself or within chains
        and wrappers.
      after: The state after it.
      gradients: What the optimizer was given, a tree like the parameters.
      storage: What the optimizer was given.
      labels: As for `measured`.

    Returns:
      By group, float32 of shape (): a share of all entries in formats of fewer digits than float32.
      Zero for a group without such formats.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import diagnostics, storage
      >>> tx = rmsprop_jax.scale_by_rms(decay=0.999, initial_scale=1.0, storage=storage.uint8())
      >>> params = {'kernel': jnp.ones((64, 64))}
      >>> _, before = tx.update(params, tx.init(params))
      >>> _, after = tx.update(params, before)
      >>> stalled = diagnostics.stalled_shares(before, after, params, storage.uint8())
      >>> 0.99 < float(stalled['kernel']) < 1
      True
    """
    nonzero = {path: g != 0 for path, g in _leaves('gradients', gradients)}
    check_alike('after', after, 'before', before)
    masks = []
    pairs = zip(stored_leaves(before, storage), stored_leaves(after, storage), strict=True)
    for old, new in pairs:
        if new.format.rounds and new.path in nonzero:
            driven, same = nonzero[new.path], old.stored == new.stored
            # PyTorch's dialect keeps two real numbers for a complex one.
            driven = driven.reshape(driven.shape + (1,) * (same.ndim - driven.ndim))
            masks.append((new.path, same & driven))
    return _shares(_groups(gradients, labels), masks)


def nonfinite_counts(tree: Any) -> dict[str, jax.Array]:
    """How many entries of each leaf are infinite or NaN, by the leaf's path.

    Args:
      tree: Gradients, updates or parameters.

    Returns:
      int32 of shape (), for each leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics
      >>> grads = {'dense': {'kernel': jnp.array([1.0, jnp.nan, -jnp.inf]), 'bias': jnp.zeros(3)}}
      >>> for path, count in diagnostics.nonfinite_counts(grads).items():
      ...     print(path, count)
      dense/bias 0
      dense/kernel 2
    """
    grouped = _grouped(_groups(tree, None), _leaves('tree', tree))
    return {
        path: sum((count_true(~jnp.isfinite(x)) for x in leaves), jnp.uint32(0)).astype(jnp.int32)
        for path, leaves in grouped.items()
    }


class Measurements(NamedTuple):
    """What `measured` keeps of a step: one array of each measurement, over groups or leaves.

    `read` takes them apart by name. Under `jax.lax.scan` or `jax.vmap` they get leading axes.

    Attributes:
      step_size: `step_sizes`, of shape (groups, quantiles), in the unit of the parameter.
      update_ratio: `update_ratios`, of shape (groups,).
      nonfinite_gradients: `nonfinite_counts` of what the optimizer was given, int32 of shape
        (leaves,).
      nonfinite_updates: `nonfinite_counts` of what it returned, int32 of shape (leaves,).
      epsilon_share: `epsilon_shares`, of shape (groups,). None unless `eps` is given.
      saturated_low: The first of `saturated_shares`, of shape (groups,). None, as the next two are,
        unless `storage` is given.
      saturated_high: The second.
      stalled: `stalled_shares`, of shape (groups,).
    """

    step_size: Any
    update_ratio: Any
    nonfinite_gradients: Any
    nonfinite_updates: Any
    epsilon_share: Any = None
    saturated_low: Any = None
    saturated_high: Any = None
    stalled: Any = None


class MeasuredState(NamedTuple):
    """State of `measured`.

    Attributes:
      count: Steps taken so far, int32 of shape (), staying at its largest value rather than
        wrapping.
      measurements: Of the last step that was measured: `optax.tree.get(state, 'measurements')`.
        Zeros before the first.
      inner: The state of the optimizer that is measured.
    """

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    measurements: Measurements
    inner: Any


def measured(
    inner: optax.GradientTransformation,
    *,
    labels: Labels = None,
    quantiles: Sequence[float] = QUANTILES,
    eps: ScalarOrSchedule | None = None,
    eps_in_sqrt: bool = True,
    storage: Storage | None = None,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Measures the steps of an optimizer, which it leaves as they are.

    Put it around the whole chain, so that updates are what is added to the parameters. Put it
    within `optax.MultiSteps`, which hands on no gradients in between, and around
    `optax.apply_if_finite`, which takes back the state of a step that failed.

    Args:
      inner: Any optimizer.
      labels: Which parameters form a group: a tree of strings like the parameters, a prefix of one,
        or a function from the parameters to one, as for `optax.partition`; for instance
        `by_depth(1)`. None makes each leaf a group, by its path.
      quantiles: Those of the step size, in [0, 1].
      eps: What `inner` was given, to measure the share of entries that it dominates; None for not
        measuring that.
      eps_in_sqrt: What `inner` was given; False for `dialects.torch`.
      storage: What `inner` was given, to measure compact formats; None for not measuring them.
      every: Measures the last of as many steps, and keeps that until the next. Quantiles are what
        costs: for each of them all entries are read 31 times.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `MeasuredState` and whose updates
      are those of `inner`. `update` needs `params`.

    Raises:
      ValueError: For quantiles outside [0, 1], for missing `params`, for a state whose moments are
        not those of the parameters.
      TypeError: For labels that are not strings.

    Where a program does not return the measurements, compilers drop them. Under `jax.jit` meshes do
    not matter, nor do they under `jax.shard_map`; with `check_vma=False`, however, each shard
    measures its own part.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import diagnostics
      >>> tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1, eps=1e-8), eps=1e-8)
      >>> params = {'dense': {'kernel': jnp.ones((2, 2)), 'bias': jnp.zeros(2)}}
      >>> grads = {'dense': {'kernel': params['dense']['kernel'], 'bias': jnp.zeros(2)}}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> found = diagnostics.read(state, params)
      >>> print(found['update_ratio/dense/kernel'].round(3))  # 0.1 / sqrt(1 - 0.9)
      0.316
      >>> print(found['epsilon_share/dense/bias'], found['nonfinite_gradients/dense/bias'])
      1.0 0
    """
    inner_ = optax.with_extra_args_support(checked_transformation('inner', inner))
    every = checked_steps('every', every, least=1)
    quantiles = checked_quantiles(quantiles)
    eps_in_sqrt = checked_flag('eps_in_sqrt', eps_in_sqrt)
    check_storage(storage)
    epsilon = None if eps is None else Hyperparameter('eps', eps).value

    def measure(*step: Any) -> Measurements:
        gradients, updates, params, before, after = lax.stop_gradient(step)
        sizes = _stacked(step_sizes(updates, labels, quantiles))
        taken = Measurements(
            step_size=sizes.reshape(-1, len(quantiles)),
            update_ratio=_stacked(update_ratios(updates, params, labels)),
            nonfinite_gradients=_stacked(nonfinite_counts(gradients), jnp.int32),
            nonfinite_updates=_stacked(nonfinite_counts(updates), jnp.int32),
        )
        if epsilon is not None:
            shares = epsilon_shares(
                after, params, epsilon, eps_in_sqrt, storage=storage, labels=labels
            )
            taken = taken._replace(epsilon_share=_stacked(shares))
        if storage is not None:
            low, high = saturated_shares(after, params, storage, labels)
            still = stalled_shares(before, after, gradients, storage, labels)
            taken = taken._replace(
                saturated_low=_stacked(low), saturated_high=_stacked(high), stalled=_stacked(still)
            )
        return taken

    def init(params: optax.Params) -> Any:
        state = inner_.init(params)
        shapes = jax.eval_shape(measure, params, params, params, state, state)
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return MeasuredState(jnp.zeros([], jnp.int32), blank, state)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        checked_state(checked_state(state, MeasuredState).measurements, Measurements)
        checked_params('measured', checked_updates(updates), params)
        new, after = inner_.update(updates, state.inner, params, **extra_args)
        count = jnp.asarray(optax.safe_increment(state.count))
        take = functools.partial(measure, updates, new, params, state.inner, after)
        if every == 1:
            return new, MeasuredState(count, take(), after)
        taken = lax.cond(count % every == 0, take, lambda: state.measurements)
        return new, MeasuredState(count, taken, after)

    return optax.GradientTransformationExtraArgs(init, update)


def read(state: Any, params: Any, labels: Labels = None) -> dict[str, Any]:
    """Measurements by name: that of the measurement, a slash, and that of the group or leaf.

    Args:
      state: A state that holds those of one `measured`, by itself or within chains and wrappers; or
        `Measurements`, which may have leading axes from `jax.lax.scan` or `jax.vmap`.
      params: The parameters, for their structure only.
      labels: What `measured` was given.

    Returns:
      A flat dictionary. Entries of `step_size` have a last axis of quantiles; the others have only
      the leading axes, if any.

    Raises:
      ValueError: If there are not measurements of exactly one `measured`, or if they are of other
        groups.

    Example:
      >>> import jax, jax.numpy as jnp, rmsprop_jax
      >>> from rmsprop_jax import diagnostics
      >>> tx = diagnostics.measured(rmsprop_jax.rmsprop(0.1), quantiles=(0.5,))
      >>> def step(carry, _):
      ...     params, state = carry
      ...     updates, state = tx.update(params, state, params)
      ...     params = jax.tree.map(jnp.add, params, updates)
      ...     return (params, state), state.measurements
      >>> params = {'w': jnp.ones(3)}
      >>> _, history = jax.lax.scan(step, (params, tx.init(params)), length=5)
      >>> found = diagnostics.read(history, params)
      >>> found['step_size/w'].shape, found['update_ratio/w'].shape
      ((5, 1), (5,))
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Measurements))
    nodes = [node for node in nodes if isinstance(node, Measurements)]
    if len(nodes) != 1:
        raise ValueError(
            f'the state holds the measurements of {len(nodes)} measured optimizers, not of one.'
        )
    leaves = tuple(dict.fromkeys(_groups(params, None).values()))
    groups = tuple(dict.fromkeys(_groups(params, labels).values()))
    found: dict[str, Any] = {}
    for field, values in nodes[0]._asdict().items():
        if values is None:
            continue
        names = leaves if field.startswith('nonfinite') else groups
        trailing = (slice(None),) if field == 'step_size' else ()
        if values.shape[-1 - len(trailing)] != len(names):
            raise ValueError(
                f'{field} was measured of {values.shape[-1 - len(trailing)]} groups, but params '
                f'and labels have {len(names)}: {", ".join(names)}.'
            )
        for i, name in enumerate(names):
            found[f'{field}/{name}' if name else field] = values[(..., i, *trailing)]
    return found


def _leaves(name: str, tree: Any) -> list[tuple[KeyPath, Any]]:
    return [(canonical(path), jnp.asarray(leaf)) for path, leaf in checked_leaves(name, tree)]


def _groups(params: Any, labels: Labels) -> dict[KeyPath, str]:
    """The name of the group that each leaf belongs to."""
    if labels is None:
        return {path: path_name(path) for path in by_path(params)}
    chosen = broadcast_prefix('labels', labels(params) if is_function(labels) else labels, params)
    groups = by_path(chosen)
    for path, label in groups.items():
        if not isinstance(label, str):
            raise TypeError(f'labels{keystr(path)} must be a string, got {label!r}.')
    return groups


def _grouped(groups: dict[KeyPath, str], leaves: Leaves) -> dict[str, list[Any]]:
    """The leaves of each group, in the order in which groups first appear."""
    found: dict[str, list[Any]] = {name: [] for name in groups.values()}
    for path, leaf in leaves:
        if path not in groups:
            raise ValueError(
                f'params{keystr(path)} does not exist, but there is a leaf of that path to measure.'
            )
        found[groups[path]].append(leaf)
    return found


def _stacked(measured: dict[str, jax.Array], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.stack(list(measured.values())) if measured else jnp.zeros(0, dtype)


def _shares(groups: dict[KeyPath, str], masks: Leaves) -> dict[str, jax.Array]:
    def share(leaves: list[jax.Array]) -> jax.Array:
        # In float32 the counts of leaves add up to a share that is right to 1e-7.
        counts = [count_true(leaf).astype(jnp.float32) for leaf in leaves]
        return sum(counts, jnp.float32(0)) / max(1, sum(map(whole_size, leaves)))

    return {name: share(leaves) for name, leaves in _grouped(groups, masks).items()}


def _length(leaves: list[jax.Array]) -> jax.Array:
    squares = [whole_sum(jnp.sum(jnp.square(as_float32(x))), split_axes(x)) for x in leaves]
    return jnp.sqrt(sum(squares, jnp.float32(0)))
