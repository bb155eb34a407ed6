"""Writes moments into optimizer states, wherever in a state they sit."""

import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map_with_path

from rmsprop_jax._types import RmsState
from rmsprop_jax.interchange._mapping import Problems, named_leaves, path_name, placed
from rmsprop_jax.interchange._state import (
    COMPACT,
    MOMENTS,
    is_average,
    is_compact,
    is_corrected,
    is_count,
    is_node,
    refilled,
    square,
    wide,
)


class LossyConversionWarning(UserWarning):
    """A second moment is smaller than the square of its mean; its variance was taken as zero.

    The framework computes `nu - mu^2` and would have gone on to the root of a negative number, or
    of noise. Nothing is wrong with the conversion; the digits were lost before it.
    """


class Writer:
    """Writes moments into a state that a transformation's `init` has made.

    Attributes:
      columns: What is to be written, by moment and path; None where a fault has been noted.
      describe: Names their entry for a moment and a path, for messages.
      problems: Where faults go.
      fresh: Paths that keep their start values.
      weight: The sum of the averaging weights of a path, None where it is uncorrected.
    """

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, np.ndarray | None]],
        describe: Callable[[str, str], str],
        problems: Problems,
        fresh: Collection[str] = (),
        weight: Callable[[str], float | None] = lambda path: None,
    ):
        self.columns, self.describe, self.problems = columns, describe, problems
        self.fresh, self.weight = fresh, weight
        self._used: set[tuple[str, str]] = set()
        self._clamped: list[str] = []

    def write(self, state: Any, count: int, calls: int | None = None) -> Any:
        """`state` with the moments and counts in it.

        Args:
          state: What `init` returned.
          count: The number of steps taken.
          calls: The number of calls, where steps are accumulated over several.

        Raises:
          InterchangeError: For all that is missing, left over or misshapen, noted before or now.
        """
        written = jax.tree.map(
            lambda node: self._node(node) if is_node(node) else node, state, is_leaf=is_node
        )
        for name, leaves in self.columns.items():
            for path in leaves:
                if (name, path) not in self._used:
                    line = f'{self.describe(name, path)} has no place: the state has no {name}'
                    self.problems.add(f'{line} for {path!r}')
        self.problems.raise_if_any()
        if self._clamped:
            warnings.warn(
                f'the second moment is smaller than the squared mean, so that the variance was '
                f'taken as 0, somewhere in {", ".join(self._clamped)}',
                LossyConversionWarning,
                stacklevel=3,
            )
        return with_counts(written, count, count if calls is None else calls)

    def _node(self, node: Any) -> Any:
        if is_compact(node):
            self.problems.add(COMPACT)
            return node
        if isinstance(node, RmsState):
            return self._rms(node)
        trees = {name: getattr(node, name) for name in MOMENTS if name in node._fields}
        if 'nu' in trees:
            self._check_correction(node.nu, is_corrected(node))
        return node._replace(**{name: self._tree(name, tree) for name, tree in trees.items()})

    def _rms(self, node: RmsState) -> RmsState:
        moments = node.nu if node.var is None else node.var
        self._check_correction(moments, is_corrected(node))
        weight = node.weight
        if weight is not None:
            weights = {self.weight(path) for path in named_leaves(moments)} - {None}
            if len(weights) > 1:
                listed = ', '.join(named_leaves(moments))
                self.problems.add(f'step counts differ between {listed}, which share one weight')
            weight = refilled(weight, weights.pop()) if weights else weight
        if node.var is None:
            return node._replace(nu=self._tree('nu', node.nu), weight=weight)
        variance = functools.partial(self._variance, named_leaves(node.mu))
        return node._replace(
            mu=self._tree('mu', node.mu),
            var=self._tree('nu', node.var, variance),
            weight=weight,
        )

    def _check_correction(self, moments: Any, corrected: bool) -> None:
        for path in named_leaves(moments):
            if path in self.fresh or path not in self.columns['nu']:
                continue
            if corrected != (self.weight(path) is not None):
                one, other = ('ours', 'theirs') if corrected else ('theirs', 'ours')
                self.problems.add(f'{path!r}: {one} is bias-corrected, {other} is not')

    def _tree(self, name: str, tree: Any, change: Callable[..., Any] | None = None) -> Any:
        def leaf(path: tuple[Any, ...], ours: Any) -> Any:
            key = path_name(path)
            if key in self.fresh:
                return ours
            entry = self.describe(name, key)
            if key not in self.columns[name]:
                self.problems.add(f'{entry} is missing')
                return ours
            self._used.add((name, key))
            given = self.columns[name][key]
            if given is None:
                return ours
            array = _as_stored(given, ours)
            if name == 'nu' and (np.real(array) < 0).any():
                self.problems.add(f'{entry} is negative')
                return ours
            if change is not None:
                array = change(key, array)
            return placed(entry, array, ours, self.problems)

        return tree_map_with_path(leaf, tree)

    def _variance(
        self, means: Mapping[str, Any], path: str, second_moment: np.ndarray
    ) -> np.ndarray:
        given, weight = self.columns['mu'].get(path), self.weight(path)
        if given is None or path not in means:
            return second_moment
        mean = _as_stored(given, means[path])
        squared_mean = square(mean, 1.0 if weight is None else weight)
        if squared_mean.shape != second_moment.shape:
            return second_moment
        difference = wide(second_moment) - squared_mean
        if (difference < 0).any():
            self._clamped.append(path)
        return np.maximum(difference, 0.0)


def _as_stored(array: np.ndarray, ours: Any) -> np.ndarray:
    """Complex numbers as pairs of reals, or as reals, where the state has them so."""
    if not np.iscomplexobj(array) or jnp.issubdtype(ours.dtype, jnp.complexfloating):
        return array
    if ours.shape == (*array.shape, 2):
        return np.stack([np.real(array), np.imag(array)], -1)
    # Optax keeps the real second moment of a complex array in a complex one.
    return array if np.imag(array).any() else np.real(array)


def with_counts(state: Any, count: int, calls: int) -> Any:
    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        if is_average(x):
            return x._replace(count=_saturated(x.count, calls))
        return _saturated(x, count) if is_count(path, x) else x

    return tree_map_with_path(leaf, state, is_leaf=is_average)


def _saturated(leaf: Any, count: int) -> Any:
    return refilled(leaf, min(count, int(jnp.iinfo(leaf.dtype).max)))
