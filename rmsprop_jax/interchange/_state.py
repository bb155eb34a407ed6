"""Reads moments from optimizer states and writes them into states, at any depth."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, keystr, tree_flatten_with_path, tree_map_with_path

from rmsprop_jax._checks import checked_leaves
from rmsprop_jax._transforms import AverageState
from rmsprop_jax._types import RmsState, TraceState, canonical, path_name
from rmsprop_jax.interchange._mapping import (
    Conversion,
    EntryError,
    as_inexact,
    as_leaf_like,
    named_leaves,
    sharding_of,
)
from rmsprop_jax.storage._formats import STATISTICS, Means

# Names, since Optax exports only two of these classes.
_OPTAX_RMS = frozenset(
    {
        'ScaleByRmsState',
        'ScaleByRmsWithCountState',
        'ScaleByRStdDevState',
        'ScaleByRStdDevWithCountState',
    }
)
MOMENTS = ('nu', 'mu', 'trace', 'ema')
# Moments by name and by path. nu is always the raw second moment. None marks an entry whose fault
# was already noted.
Columns = dict[str, dict[str, Any]]
COMPACT = (
    'the state is in compact storage: decode it with storage.read; storage.convert converts a '
    'float32 state to other formats'
)

NO_STATISTICS = (
    'the state has no RMSProp statistics: pass what tx.init or tx.update returned, or opt_state of '
    'an nnx.Optimizer; its nnx.state does not tell statistics apart'
)


class LossyConversionWarning(UserWarning):
    """A second moment is smaller than the square of its mean; the variance was set to zero.

    The framework computes `nu - mu^2` and would have taken the root of a negative number, or of
    noise. The conversion is correct; the digits were lost before it.
    """


@dataclasses.dataclass(frozen=True)
class Moments:
    """The contents of a state.

    Attributes:
      columns: Arrays by moment and path, in the dtype that they have in the state.
      counts: All step counts in the state.
      corrected: The step counts of the bias-corrected second moments, by path.
      weights: The sums of their averaging weights, if the state has them.
    """

    columns: Columns
    counts: Collection[int]
    corrected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        return max(self.counts, default=0)


def is_node(node: Any) -> bool:
    """Whether a part of a state contains moments."""
    return (
        is_average(node)
        or isinstance(node, RmsState | TraceState | optax.TraceState)
        or (type(node).__name__ in _OPTAX_RMS and hasattr(node, 'nu'))
    )


def described(moment: str, path: str) -> str:
    """The name of a parameter's moment in messages, if its framework has no better name."""
    return f'{moment} of {path!r}'


def nodes_of(state: Any) -> list[Any]:
    """The parts of a state that contain moments."""
    return [node for node in jax.tree.leaves(state, is_leaf=is_node) if is_node(node)]


def map_nodes(change: Callable[[Any], Any], state: Any) -> Any:
    """`state` with `change` applied to the parts that contain moments."""
    return jax.tree.map(lambda x: change(x) if is_node(x) else x, state, is_leaf=is_node)


def is_compact(node: Any) -> bool:
    """Whether some statistic is in a storage format that must be decoded first."""
    if not isinstance(node, RmsState | TraceState):
        return False
    trees = [getattr(node, name, None) for name in STATISTICS]
    leaves = jax.tree.leaves(trees, is_leaf=lambda x: isinstance(x, Means))
    return any(isinstance(x, Means) or x.dtype.itemsize < 4 for x in leaves)


def is_average(node: Any) -> bool:
    """Whether a node contains an average of parameters, whose count counts calls, not steps."""
    return isinstance(node, AverageState)


def is_named(path: tuple[Any, ...], *fields: str) -> bool:
    """Whether a path ends in one of these fields of a state, also inside Flax NNX variables."""
    return bool(path) and canonical(path)[-1] in map(GetAttrKey, fields)


def leaves_named(state: Any, *fields: str) -> list[Any]:
    """The leaves of a state in these fields."""
    return [leaf for path, leaf in tree_flatten_with_path(state)[0] if is_named(path, *fields)]


def is_count(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf is a step count: an integer, which parameters are not."""
    return is_named(path, 'count', 'gradient_step') and jnp.issubdtype(
        jnp.result_type(leaf), jnp.integer
    )


def is_centered(node: Any) -> bool:
    """Whether a node contains a variance instead of a raw second moment."""
    return isinstance(node, RmsState) and node.var is not None


def is_corrected(node: Any) -> bool:
    """Whether a node with a second moment divides it by the sum of its weights."""
    return node.weight is not None if isinstance(node, RmsState) else 'count' in node._fields


def moments_in(state: Any, conversion: Conversion, name: str = 'state') -> Moments:
    """The moments in `state`.

    Raises:
      TypeError: If a leaf is not an array; the message gives `name` and the path of the leaf.
      ValueError: If `state` is not a tree.
    """
    checked_leaves(name, state)
    columns: Columns = {moment: {} for moment in MOMENTS}
    corrected: dict[str, int] = {}
    weights: dict[str, float] = {}
    nodes = nodes_of(state)
    if not nodes:
        conversion.add(NO_STATISTICS)
    for node in nodes:
        if is_compact(node):
            conversion.add(COMPACT)
            continue
        for moment, leaves in _node_columns(node, conversion).items():
            for path in leaves.keys() & columns[moment].keys():
                conversion.add(f'{path!r} has more than one {moment} in the state')
            columns[moment].update(leaves)
            if moment == 'nu' and is_corrected(node):
                corrected |= dict.fromkeys(leaves, int(np.asarray(node.count)))
                if isinstance(node, RmsState):
                    weights |= dict.fromkeys(leaves, float(node.weight))  # pyright: ignore[reportArgumentType]
    return Moments(columns, _step_counts(state, conversion), corrected, weights)


def _step_counts(state: Any, conversion: Conversion) -> Collection[int]:
    counts: set[int] = set()
    for path, leaf in tree_flatten_with_path(state, is_leaf=is_average)[0]:
        is_mini = is_named(path, 'mini_step')
        if is_average(leaf) or not (is_mini or is_count(path, leaf)):
            continue
        if jnp.shape(leaf):
            conversion.add(f'{keystr(path)} has shape {jnp.shape(leaf)}: it is not a step count')
        elif not is_mini:
            counts.add(int(leaf))
        elif int(leaf) != 0:
            conversion.add(
                f'{keystr(path)} is {int(leaf)}: the state contains accumulated gradients, which '
                'have no counterpart there. Convert when it is 0'
            )
    return counts


def _node_columns(node: Any, conversion: Conversion) -> Columns:
    """The moments of one node, with the raw second moment instead of a variance."""
    columns: Columns = {moment: {} for moment in MOMENTS if moment in node._fields}
    with conversion.at_once():
        for moment, column in columns.items():
            for path, x in named_leaves(getattr(node, moment)).items():
                with conversion.noted():
                    column[path] = as_inexact(described(moment, path), np.asarray(x))
    if is_centered(node):
        weight = 1.0 if node.weight is None else float(node.weight)
        columns['nu'] = {
            path: (wide(var) + square(columns['mu'][path], weight)).astype(var.dtype)
            for path, var in named_leaves(node.var).items()
        }
    return columns


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes moments into a state that was made by the `init` of a transformation.

    Attributes:
      moments: The moments to write.
      describe: Maps a moment and a path to the name of their entry in messages.
      conversion: Collects problems.
      fresh: Paths that keep their start values.
      used: The moments and paths that were written.
      clamped: The paths whose variance would have been negative.
    """

    moments: Moments
    describe: Callable[[str, str], str]
    conversion: Conversion
    fresh: Collection[str] = ()
    used: set[tuple[str, str]] = dataclasses.field(default_factory=set, init=False)
    clamped: list[str] = dataclasses.field(default_factory=list, init=False)

    def write(self, state: Any, calls: int | None = None) -> Any:
        """`state` with the moments and counts.

        Args:
          state: The result of `init`.
          calls: The number of calls, if a step accumulates several.

        Raises:
          InterchangeError: If anything is missing, left over or misshapen, including problems noted
            earlier.
        """
        written = map_nodes(self._node, state)
        for moment, column in self.moments.columns.items():
            for path in column:
                if (moment, path) not in self.used:
                    line = f'{self.describe(moment, path)} has no place: the state has no {moment}'
                    self.conversion.add(f'{line} for {path!r}')
        self.conversion.raise_if_any()
        if self.clamped:
            warnings.warn(
                'the variance was set to 0 where the second moment is smaller than the squared '
                f'mean, in {", ".join(self.clamped)}',
                LossyConversionWarning,
                stacklevel=4,
            )
        count = self.moments.count
        return with_counts(written, count, count if calls is None else calls)

    def _node(self, node: Any) -> Any:
        if is_compact(node):
            self.conversion.add(COMPACT)
            return node
        moments = [moment for moment in MOMENTS if moment in node._fields]
        changes = {moment: self._tree(moment, getattr(node, moment)) for moment in moments}
        if is_centered(node):
            variance = functools.partial(self._variance, named_leaves(node.mu))
            changes['var'] = self._tree('nu', node.var, variance)
        if 'nu' in moments:
            paths = named_leaves(node.var if is_centered(node) else node.nu)
            self._check_correction(paths, is_corrected(node))
            if isinstance(node, RmsState) and node.weight is not None:
                changes['weight'] = self._weight(node.weight, paths)
        return node._replace(**changes)

    def _check_correction(self, paths: Collection[str], corrected: bool) -> None:
        for path in paths:
            if path in self.fresh or path not in self.moments.columns['nu']:
                continue
            if corrected != (path in self.moments.weights):
                one, other = ('ours', 'theirs') if corrected else ('theirs', 'ours')
                self.conversion.add(f'{path!r}: {one} is bias-corrected, {other} is not')

    def _weight(self, ours: jax.Array, paths: Collection[str]) -> Any:
        weights = {self.moments.weights[path] for path in paths if path in self.moments.weights}
        if len(weights) > 1:
            listed = ', '.join(paths)
            self.conversion.add(f'step counts differ between {listed}, which share one weight')
        return refilled(ours, weights.pop()) if weights else ours

    def _tree(self, moment: str, tree: Any, change: Callable[..., Any] | None = None) -> Any:
        column = self.moments.columns[moment]

        def leaf(path: tuple[Any, ...], ours: Any) -> Any:
            key = path_name(path)
            if key in self.fresh:
                return ours
            entry = self.describe(moment, key)
            with self.conversion.noted():
                if key not in column:
                    raise EntryError(f'{entry} is missing')
                self.used.add((moment, key))
                if column[key] is not None:
                    array = _as_stored(column[key], ours)
                    if moment == 'nu' and (np.real(array) < 0).any():
                        raise EntryError(f'{entry} is negative')
                    return as_leaf_like(ours, entry, change(key, array) if change else array)
            return ours

        return tree_map_with_path(leaf, tree)

    def _variance(
        self, means: Mapping[str, Any], path: str, second_moment: np.ndarray
    ) -> np.ndarray:
        given = self.moments.columns['mu'].get(path)
        if given is None or path not in means:
            return second_moment
        squared_mean = square(_as_stored(given, means[path]), self.moments.weights.get(path, 1.0))
        if squared_mean.shape != second_moment.shape:
            return second_moment
        difference = wide(second_moment) - squared_mean
        if (difference < 0).any():
            self.clamped.append(path)
        return np.maximum(difference, 0.0)


def wide(array: Any) -> np.ndarray:
    """`array` in double precision."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def square(mean: Any, weight: float) -> np.ndarray:
    """`|mean|^2 / weight`; 0 if nothing has been averaged yet."""
    exact = wide(mean)
    return (np.real(exact) ** 2 + np.imag(exact) ** 2) / (weight or 1.0)


def refilled(leaf: Any, value: Any) -> Any:
    """`value` with the dtype and sharding of `leaf`."""
    return jax.device_put(np.asarray(value).astype(leaf.dtype), sharding_of(leaf))


def _as_stored(array: np.ndarray, ours: Any) -> np.ndarray:
    """Converts complex numbers to pairs of reals, or to reals, if the state stores them so."""
    if not np.iscomplexobj(array) or jnp.issubdtype(ours.dtype, jnp.complexfloating):
        return array
    if ours.shape == (*array.shape, 2):
        return np.stack([np.real(array), np.imag(array)], -1)
    # Optax stores the real second moment of a complex array as a complex array.
    return array if np.imag(array).any() else np.real(array)


def with_counts(state: Any, count: int, calls: int) -> Any:
    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        if is_average(x):
            return x._replace(count=_saturated(x.count, calls))
        return _saturated(x, count) if is_count(path, x) else x

    return tree_map_with_path(leaf, state, is_leaf=is_average)


def _saturated(leaf: Any, count: int) -> Any:
    return refilled(leaf, min(count, int(jnp.iinfo(leaf.dtype).max)))


def accumulates(state: Any) -> bool:
    """Whether a wrapper accumulates the gradients of several calls."""
    return bool(leaves_named(state, 'mini_step'))


def injected(state: Any, name: str) -> dict[tuple[Any, ...], Any]:
    """The constants called `name` that `inject_hyperparams` keeps in a state, by key path."""
    ends = (GetAttrKey('hyperparams'), DictKey(name))
    scheduled = (GetAttrKey('hyperparams_states'), DictKey(name))
    leaves = tree_flatten_with_path(state)[0]
    paths = [(path, canonical(path), leaf) for path, leaf in leaves]
    driven = {path[:-3] for _, path, _ in paths if path[-3:-1] == scheduled}
    return {
        full: leaf for full, path, leaf in paths if path[-2:] == ends and path[:-2] not in driven
    }


def with_injected(state: Any, name: str, value: float) -> Any:
    """`state` with the injected constants called `name` set to `value`, if there are any."""
    places = injected(state, name)
    return tree_map_with_path(lambda path, x: refilled(x, value) if path in places else x, state)
