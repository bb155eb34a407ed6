"""Measurements of optimizer steps: how long they are, what decides that, and what goes wrong.

`measured` wraps an optimizer and keeps the measurements of the last step in the state; `read` names
them. The measuring functions can also be called directly, inside or outside jit. An optimizer that
is not measured costs nothing extra: no other module of the package uses this one.

Measurements describe groups of parameters, are float32, and have no derivative.
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
    """Labels that group parameters by the first names of their paths, such as layer names.

    Args:
      depth: How many names to use.

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

    Works for every optimizer of this package, whether its rate is a constant, a schedule or a
    number in the state of `inject_hyperparams`, and inside chains, `optax.masked`,
    `optax.partition`, `optax.MultiSteps` and other wrappers. The step is traced, but only the rates
    are computed. May be called inside jit.

    Args:
      tx: The optimizer.
      state: Its state; for an `nnx.Optimizer`, `optimizer.opt_state`.
      params: The parameters.
      extra_args: Further arguments of `tx.update`, such as `value` for `reduce_on_plateau`.

    Returns:
      A rate for each parameter path, of shape (), in the unit of the parameter. A rate that is a
      Python number has the default floating dtype. Parameters that are not updated by an optimizer
      of this package are left out. Later changes to the updates, such as `optax.scale`, are not
      included.

    Raises:
      TypeError: If `tx` is not a transformation, or parameters are not arrays.
      ValueError: If `tx` has no learning rate of this package, as in
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
    """Quantiles of the step sizes of the entries of the parameters.

    ::

        s_q = the ceil(q n)-th smallest of the |u_i| of the group, n their number

    This is the effective step size of Kingma and Ba. For RMSProp without momentum it is at most
    `learning_rate / sqrt(1 - decay)`, and near `learning_rate` if gradients are steady. Entries are
    not moved or copied: each quantile compares all entries of a group with a guess 31 times, so
    arrays of any size may stay sharded over any mesh.

    Args:
      updates: The updates that are added to the parameters, in their unit.
      labels: As for `measured`.
      quantiles: The shares q, in [0, 1].

    Returns:
      For each group, float32 of shape (quantiles,), in the unit of the parameter. NaN counts as
      larger than any number. Zero for a group without entries.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics
      >>> updates = {'w': jnp.array([0.1, -0.3, 0.2, -0.4])}
      >>> print(diagnostics.step_sizes(updates, quantiles=(0.25, 0.5, 1.0))['w'])
      [0.1 0.2 0.4]

    Source: Kingma and Ba, Adam, arXiv:1412.6980, section 2.1. The quantiles follow NumPy's method
    'inverted_cdf'.
    """
    shares = checked_quantiles(quantiles)
    grouped = _grouped(_groups(updates, labels), _leaves('updates', updates))
    return {name: quantiles_of(name, leaves, shares) for name, leaves in grouped.items()}


def update_ratios(updates: Any, params: Any, labels: Labels = None) -> dict[str, jax.Array]:
    """The norm of the step divided by the norm of the parameters.

    ::

        r = sqrt(sum |u_i|^2) / sqrt(sum |p_i|^2)        over the entries of the group

    Args:
      updates: The updates that are added to the parameters.
      params: The parameters before the step.
      labels: As for `measured`.

    Returns:
      For each group, float32 of shape (), without unit. Zero if the updates are zero, infinity if
      only the parameters are.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics
      >>> params = {'w': jnp.array([3.0, -4.0])}
      >>> ratios = diagnostics.update_ratios({'w': jnp.array([0.0, 0.005])}, params)
      >>> print(ratios['w'].round(6))
      0.001
    """
    groups = _groups(params, labels)
    trees = _leaves('updates', updates), _leaves('params', params)
    steps, sizes = (_grouped(groups, leaves) for leaves in trees)

    def ratio(step: jax.Array, size: jax.Array) -> jax.Array:
        return jnp.where(step == 0, 0, step / jnp.where(step == 0, 1, size))

    return {name: ratio(_length(steps[name]), _length(sizes[name])) for name in steps}


def epsilon_shares(
    state: Any,
    params: Any,
    eps: ScalarOrSchedule,
    eps_in_sqrt: bool = True,
    *,
    storage: Storage | None = None,
    labels: Labels = None,
) -> dict[str, jax.Array]:
    """The share of entries whose denominator is dominated by epsilon.

    ::

        share of  nu_i < eps           with eps_in_sqrt, else of  sqrt(nu_i) < eps

    after bias correction, and with the variance instead of `nu` if centered. Such entries take
    steps in proportion to their gradient, as SGD does with the learning rate
    `learning_rate / sqrt(eps)`, or `learning_rate / eps`. With the usual small epsilon these are
    the entries whose gradient has been zero; with the large epsilon of some recipes, most entries.

    Args:
      state: The state after the step, of an optimizer of this package, by itself or inside chains
        and wrappers.
      params: The parameters that it belongs to.
      eps: The optimizer's `eps`: a number, a scalar array or a schedule.
      eps_in_sqrt: The optimizer's `eps_in_sqrt`; False for `dialects.torch`.
      storage: The optimizer's `storage`.
      labels: As for `measured`.

    Returns:
      For each group, float32 of shape (). Zero for a group without second moments.

    Raises:
      ValueError: If the state has no second moments, or moments of other parameters.

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
        # The step used the epsilon of the count before it was incremented.
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
    """The shares of entries at the lower and upper end of the range of their storage format.

    This is `storage.saturation`, aggregated over the statistics of a group whose formats have such
    ends.

    Args:
      state: The state of an optimizer of this package, by itself or inside chains and wrappers.
      params: The parameters that it belongs to.
      storage: The optimizer's `storage`.
      labels: As for `measured`.

    Returns:
      The lower and the upper share for each group, float32 of shape (). Zero for a group without
      such ends.

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
    """The share of compact entries that did not change although their gradient was not zero.

    The formats of this package round stochastically. With a slow decay, most entries stay the same
    at any one step, a few move too far, and the average is right. The share is then steadily below
    one. It is one at every step if nothing moves any more, for example below the lower end of a
    format or with round-to-nearest.

    Args:
      before: The state before the step, of an optimizer of this package, by itself or inside chains
        and wrappers.
      after: The state after the step.
      gradients: The gradients that the optimizer was given, a tree like the parameters.
      storage: The optimizer's `storage`.
      labels: As for `measured`.

    Returns:
      For each group, float32 of shape (): a share of all entries in formats with fewer digits than
      float32. Zero for a group without such formats.

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
            # PyTorch's dialect stores a complex number as two reals.
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
    """The measurements of one step: an array for each, over groups or leaves.

    `read` splits them by name. `jax.lax.scan` and `jax.vmap` add leading axes.

    Attributes:
      step_size: `step_sizes`, of shape (groups, quantiles), in the unit of the parameter.
      update_ratio: `update_ratios`, of shape (groups,).
      nonfinite_gradients: `nonfinite_counts` of the gradients that the optimizer was given, int32
        of shape (leaves,).
      nonfinite_updates: `nonfinite_counts` of the updates that it returned, int32 of shape
        (leaves,).
      epsilon_share: `epsilon_shares`, of shape (groups,). None unless `eps` is given.
      saturated_low: The lower of `saturated_shares`, of shape (groups,). This and the next two are
        None unless `storage` is given.
      saturated_high: The upper of `saturated_shares`, of shape (groups,).
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
      count: Steps taken so far, int32 of shape (). Stays at the largest int32 instead of wrapping.
      measurements: The measurements of the last measured step:
        `optax.tree.get(state, 'measurements')`. Zeros before the first.
      inner: The state of the measured optimizer.
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
    """Measures the steps of an optimizer without changing them.

    Put it around the whole chain, so that the updates are those added to the parameters. Put it
    inside `optax.MultiSteps`, which does not call it between steps, and around
    `optax.apply_if_finite`, which restores the old state when a step fails.

    Args:
      inner: Any optimizer.
      labels: Which parameters form a group: a tree of strings like the parameters, a prefix of one,
        or a function from the parameters to one, as for `optax.partition`; for instance
        `by_depth(1)`. None makes each leaf a group, named by its path.
      quantiles: Which quantiles of the step size to measure, in [0, 1].
      eps: The `eps` of `inner`, to measure the share of entries that it dominates. None skips this.
      eps_in_sqrt: The `eps_in_sqrt` of `inner`; False for `dialects.torch`.
      storage: The `storage` of `inner`, to measure compact formats. None skips this.
      every: Measures the last of every `every` steps, and keeps the result until the next
        measurement. Quantiles cost the most: each reads all entries 31 times.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `MeasuredState` and whose updates
      are those of `inner`. `update` needs `params`.

    Raises:
      ValueError: If quantiles are outside [0, 1], `params` are missing, or the moments of a state
        belong to other parameters.
      TypeError: If labels are not strings.

    Compilers drop measurements that a program does not return. Measurements are the same on every
    mesh, under `jax.jit` and under `jax.shard_map`, except that with `check_vma=False` each shard
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

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
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
    """Measurements by name, such as `step_size/kernel`: the measurement, then the group or leaf.

    Args:
      state: A state that contains one `MeasuredState`, by itself or inside chains and wrappers; or
        `Measurements`, which may have leading axes from `jax.lax.scan` or `jax.vmap`.
      params: The parameters; only their structure is used.
      labels: The `labels` of `measured`.

    Returns:
      A flat dictionary. Entries of `step_size` have a last axis of quantiles; the others have only
      the leading axes, if any.

    Raises:
      ValueError: If the state does not contain the measurements of exactly one `measured`, or if
        these have other groups.

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
            f'the state has measurements of {len(nodes)} optimizers; it must have those of one.'
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
                f'{field} has {values.shape[-1 - len(trailing)]} groups, but params and labels '
                f'have {len(names)}: {", ".join(names)}.'
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
                f'params{keystr(path)} does not exist, but a leaf with that path is to be measured.'
            )
        found[groups[path]].append(leaf)
    return found


def _stacked(measured: dict[str, jax.Array], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.stack(list(measured.values())) if measured else jnp.zeros(0, dtype)


def _shares(groups: dict[KeyPath, str], masks: Leaves) -> dict[str, jax.Array]:
    def share(leaves: list[jax.Array]) -> jax.Array:
        # Adding counts in float32 gives a share that is accurate to 1e-7.
        counts = [count_true(leaf).astype(jnp.float32) for leaf in leaves]
        return sum(counts, jnp.float32(0)) / max(1, sum(map(whole_size, leaves)))

    return {name: share(leaves) for name, leaves in _grouped(groups, masks).items()}


def _length(leaves: list[jax.Array]) -> jax.Array:
    squares = [whole_sum(jnp.sum(jnp.square(as_float32(x))), split_axes(x)) for x in leaves]
    return jnp.sqrt(sum(squares, jnp.float32(0)))
