"""The one place where array mathematics meets trees: state is made, matched and updated here.

Every leaf is visited once per update, in one flatten and one unflatten of the gradient tree, and
every complaint names the offending leaf by its path.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import DTypeLike

from rmsprop_jax._types import real_dtype, wide_dtype

KeyPath = tuple[Any, ...]


def init_like(params: Any, fill: Any, *, real: bool = False) -> Any:
    """A tree shaped, sharded and placed like `params`, filled with one number, in float32 or wider.

    Args:
      params: Any tree of floating or complex arrays (or `jax.ShapeDtypeStruct`s).
      fill: A scalar, possibly traced.
      real: Whether complex parameters get a real leaf.
    """

    def leaf(path: KeyPath, param: Any) -> jax.Array:
        dtype = wide_dtype(_inexact_dtype(f'params{keystr(path)}', param))
        return _full_like(param, fill, real_dtype(dtype) if real else dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


def map_leaves(
    step: Callable[..., tuple[jax.Array, ...]],
    updates: Any,
    *,
    magnitudes: Sequence[Any] = (),
    means: Sequence[Any] = (),
    params: Any = None,
) -> tuple[Any, ...]:
    """Applies `step` to each leaf of `updates` with its moments; returns a tree of each result.

    Args:
      step: Maps a gradient in the moments' precision, and one leaf of each moment, to a tuple: the
        new update, which is cast to the gradient's dtype, and the new leaf of each moment.
      updates: The tree of gradients.
      magnitudes: Moments that are real even where the gradient is complex.
      means: Moments that are complex where the gradient is.
      params: The parameters, where the caller has them: a complex gradient of a real one is
        refused.

    Raises:
      ValueError: If a moment's structure or the shape of one of its leaves differs from the
        gradients'.
      TypeError: If a gradient is not floating or complex, or is complex where its moment or
        parameter is not.
    """
    leaves, treedef = tree_flatten_with_path(updates)
    columns = [_match(treedef, updates, moment) for moment in (*magnitudes, *means)]
    # Wrappers may pass any tree as params, so a different one is no error.
    known = params is not None and jax.tree.structure(params) == treedef
    kinds = jax.tree.leaves(params) if known else [None] * len(leaves)
    results = []
    for (path, g), kind, *moments in zip(leaves, kinds, *columns, strict=True):
        kindred = [kind, *moments[len(magnitudes) :]]
        _check_leaf(f'updates{keystr(path)}', g, moments, [x for x in kindred if x is not None])
        wide = real_dtype(moments[0].dtype)
        if jnp.iscomplexobj(g):
            wide = np.promote_types(wide, np.complex64)
        update, *moments = step(jnp.asarray(g, wide), *moments)
        results.append((update.astype(jnp.result_type(g)), *moments))
    outputs = zip(*results, strict=True) if results else [()] * (1 + len(columns))
    return tuple(treedef.unflatten(output) for output in outputs)


def widen(tree: Any) -> Any:
    """Casts floating and complex leaves to their accumulation dtype, and leaves others alone."""

    def leaf(x: Any) -> Any:
        dtype = jnp.result_type(x)
        return jnp.asarray(x, wide_dtype(dtype)) if jnp.issubdtype(dtype, jnp.inexact) else x

    return jax.tree.map(leaf, tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Casts each leaf of `tree` to the dtype of the same leaf of `like`."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def _full_like(param: Any, fill: Any, dtype: DTypeLike) -> jax.Array:
    if not isinstance(param, Tracer):
        filled = jnp.full(jnp.shape(param), fill, dtype, device=getattr(param, 'sharding', None))
        # A scalar filled with an array is that array: shared, it could not be donated.
        return filled.copy() if isinstance(fill, jax.Array) else filled
    # Under jit a constant does not take part in sharding propagation and would be replicated. An
    # elementwise function of the parameter does, on meshes with automatic and with explicit axes,
    # and it stays in the parameter's memory.
    zeros = lax.convert_element_type(lax.eq(param, param), dtype) * 0
    return zeros + (lax.convert_element_type(fill, dtype) if isinstance(fill, jax.Array) else fill)


def _inexact_dtype(name: str, leaf: Any) -> np.dtype:
    try:
        dtype = leaf.dtype if hasattr(leaf, 'dtype') else jnp.result_type(leaf)
    except (TypeError, ValueError):
        raise TypeError(f'{name} is a {type(leaf).__name__}, not an array.') from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f'{name} has dtype {dtype}, but RMSProp needs floating or complex leaves. Leave it out '
            'with optax.masked or optax.partition.'
        )
    return dtype


def _match(treedef: Any, updates: Any, moment: Any) -> list[Any]:
    try:
        return treedef.flatten_up_to(moment)
    except (ValueError, TypeError):
        raise ValueError(_structure_difference(updates, moment)) from None


def _structure_difference(updates: Any, state: Any) -> str:
    here, there = _paths(updates), _paths(state)
    lines = ['the structure of updates does not match that of the optimizer state.']
    lines += [f'  only in updates: {_listed(here - there)}'] * bool(here - there)
    lines += [f'  only in the state: {_listed(there - here)}'] * bool(there - here)
    lines += [f'  updates: {jax.tree.structure(updates)}', f'  state: {jax.tree.structure(state)}']
    return '\n'.join(lines)


def _paths(tree: Any) -> set[str]:
    return {keystr(path) or 'a single leaf' for path, _ in tree_flatten_with_path(tree)[0]}


def _listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    more = [f'and {len(ordered) - most} more'] * (len(ordered) > most)
    return ', '.join(ordered[:most] + more)


def _check_leaf(name: str, g: Any, moments: Sequence[Any], kindred: Sequence[Any]) -> None:
    dtype = _inexact_dtype(name, g)
    for moment in moments:
        if not hasattr(moment, 'shape') or moment.shape != jnp.shape(g):
            held = getattr(moment, 'shape', type(moment).__name__)
            raise ValueError(f'{name} has shape {jnp.shape(g)}, but the state has {held} there.')
    for other in kindred:
        if jnp.iscomplexobj(other) != jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f'{name} has dtype {dtype}, but its parameter or state is {jnp.result_type(other)}.'
            )
