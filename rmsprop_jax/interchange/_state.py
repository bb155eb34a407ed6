"""Reads moments out of optimizer states and writes them in, wherever in a state they sit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import (
    DictKey,
    GetAttrKey,
    keystr,
    tree_flatten_with_path,
    tree_map_with_path,
)

from rmsprop_jax._checks import checked_leaves
from rmsprop_jax._transforms import AverageState
from rmsprop_jax._types import RmsState, TraceState, canonical
from rmsprop_jax.interchange._mapping import (
    Pair,
    Problems,
    as_array,
    laid_out,
    named_leaves,
    sharding_of,
)
from rmsprop_jax.storage._formats import STATISTICS, Means

# By name, since Optax exports only two of these classes.
_OPTAX_RMS = frozenset(
    {
        'ScaleByRmsState',
        'ScaleByRmsWithCountState',
        'ScaleByRStdDevState',
        'ScaleByRStdDevWithCountState',
    }
)
# How moments travel: by name and by path, nu always the raw second moment; None where one is there
# but at fault, which has been noted.
Columns = dict[str, dict[str, np.ndarray | None]]
MOMENTS = ('nu', 'mu', 'trace', 'ema')
COMPACT = (
    'the state is in compact storage: storage.read decodes it, and storage.convert brings a '
    'float32 state into other formats'
)

NO_STATISTICS = (
    'the state has no statistics of RMSProp in it: pass what tx.init or tx.update returned, or '
    'opt_state of an nnx.Optimizer; in nnx.state of one they cannot be told apart'
)


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a state holds, by moment and by path.

    Attributes:
      columns: Arrays, in the dtype they have in the state.
      weights: For bias-corrected second moments: the step count and the sum of weights, where the
        state has them.
      counts: All step counts in the state.
    """

    columns: dict[str, dict[str, np.ndarray]]
    weights: dict[str, tuple[int, float | None]]
    counts: frozenset[int]


def is_node(node: Any) -> bool:
    """Whether a part of a state is one that holds moments."""
    return (
        is_average(node)
        or isinstance(node, RmsState | TraceState | optax.TraceState)
        or (type(node).__name__ in _OPTAX_RMS and hasattr(node, 'nu'))
    )


def is_compact(node: Any) -> bool:
    """Whether some statistic is kept in a storage format that is to be decoded first."""
    if not isinstance(node, RmsState | TraceState):
        return False
    trees = [getattr(node, name, None) for name in STATISTICS]
    leaves = jax.tree.leaves(trees, is_leaf=lambda x: isinstance(x, Means))
    return any(isinstance(x, Means) or x.dtype.itemsize < 4 for x in leaves)


def is_average(node: Any) -> bool:
    """Whether it holds an average of the parameters, whose count is of calls, not of steps."""
    return isinstance(node, AverageState)


def is_named(path: tuple[Any, ...], *fields: str) -> bool:
    """Whether a leaf is one of these fields of a state, also within the variables of Flax NNX."""
    return bool(path) and canonical(path)[-1] in map(GetAttrKey, fields)


def is_count(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf counts steps: those are integers, and parameters are none."""
    return is_named(path, 'count', 'gradient_step') and jnp.issubdtype(
        jnp.result_type(leaf), jnp.integer
    )


def is_corrected(node: Any) -> bool:
    """Whether a node with a second moment divides it by the sum of its weights."""
    return node.weight is not None if isinstance(node, RmsState) else 'count' in node._fields


def read(state: Any, problems: Problems, name: str = 'state') -> Moments:
    """The moments in `state`.

    Raises:
      TypeError: For a leaf that is no array; the message gives `name` and the leaf's path.
      ValueError: For what is no tree.
    """
    checked_leaves(name, state)
    columns: dict[str, dict[str, np.ndarray]] = {name: {} for name in MOMENTS}
    weights: dict[str, tuple[int, float | None]] = {}
    nodes = [node for node in jax.tree.leaves(state, is_leaf=is_node) if is_node(node)]
    if not nodes:
        problems.add(NO_STATISTICS)
    for node in nodes:
        if is_compact(node):
            problems.add(COMPACT)
            continue
        found = _node_columns(node, problems)
        for name, leaves in found.items():
            for path in leaves.keys() & columns[name].keys():
                problems.add(f'{path!r} has more than one {name} in the state')
            columns[name].update(leaves)
        if 'nu' in found and is_corrected(node):
            weight = float(node.weight) if isinstance(node, RmsState) else None  # pyright: ignore[reportArgumentType]
            weights.update(dict.fromkeys(found['nu'], (int(np.asarray(node.count)), weight)))
    counts: set[int] = set()
    for path, leaf in tree_flatten_with_path(state, is_leaf=is_average)[0]:
        is_mini = is_named(path, 'mini_step')
        if is_average(leaf) or not (is_mini or is_count(path, leaf)):
            continue
        if jnp.shape(leaf):
            problems.add(f'{keystr(path)} has shape {jnp.shape(leaf)}: it is no number of steps')
        elif not is_mini:
            counts.add(int(leaf))
        elif int(leaf) != 0:
            problems.add(
                f'{keystr(path)} is {int(leaf)}: gradients are being accumulated, and have no '
                'counterpart there. Convert when it is 0'
            )
    return Moments(columns, weights, frozenset(counts))


def _node_columns(node: Any, problems: Problems) -> dict[str, dict[str, np.ndarray]]:
    """One node's moments, with the raw second moment in the place of a variance."""
    columns: dict[str, dict[str, np.ndarray]] = {}
    for name in MOMENTS:
        if name in node._fields:
            leaves = named_leaves(getattr(node, name))
            columns[name] = {path: np.asarray(x) for path, x in leaves.items()}
            for path, array in columns[name].items():
                if not jnp.issubdtype(array.dtype, jnp.inexact):
                    problems.add(
                        f'{name} of {path!r} has dtype {array.dtype}, not a floating or complex one'
                    )
    problems.raise_if_any()
    if isinstance(node, RmsState) and node.var is not None:
        weight = 1.0 if node.weight is None else float(node.weight)
        columns['nu'] = {
            path: (wide(var) + square(columns['mu'][path], weight)).astype(var.dtype)
            for path, var in named_leaves(node.var).items()
        }
    return columns


def collect(
    columns: Columns,
    moment: str,
    pair: Pair,
    label: str,
    value: Any,
    problems: Problems,
) -> None:
    """Puts one of their arrays into `columns`, with our axes, or notes its fault."""
    array = as_array(label, value, problems)
    if array is not None:
        array = laid_out(label, pair.layout.to_ours, array, problems)
    columns[moment][str(pair.ours)] = array


def wide(array: Any) -> np.ndarray:
    """`array` in double precision."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def square(mean: Any, weight: float) -> np.ndarray:
    """`|mean|^2 / weight`, and 0 where nothing has been averaged yet."""
    exact = wide(mean)
    return (np.real(exact) ** 2 + np.imag(exact) ** 2) / (weight or 1.0)


def refilled(leaf: Any, value: Any) -> Any:
    """A number in the place of a leaf, with its dtype and sharding."""
    return jax.device_put(np.asarray(value).astype(leaf.dtype), sharding_of(leaf))


def injected(state: Any, name: str) -> dict[tuple[Any, ...], Any]:
    """The constants called `name` that `inject_hyperparams` holds in a state, by key path."""
    ends = (GetAttrKey('hyperparams'), DictKey(name))
    scheduled = (GetAttrKey('hyperparams_states'), DictKey(name))
    leaves = tree_flatten_with_path(state)[0]
    paths = [(path, canonical(path), leaf) for path, leaf in leaves]
    driven = {path[:-3] for _, path, _ in paths if path[-3:-1] == scheduled}
    return {
        full: leaf for full, path, leaf in paths if path[-2:] == ends and path[:-2] not in driven
    }


def with_injected(state: Any, name: str, value: float) -> Any:
    """`state` with that constant set, where there is one."""
    places = injected(state, name)
    return tree_map_with_path(lambda path, x: refilled(x, value) if path in places else x, state)
