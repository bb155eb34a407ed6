"""Checks of arguments, whose messages name the argument and the path of the leaf."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path


def checked_flag(name: str, value: Any) -> bool:
    """Returns `value` as a bool; raises if it is anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f'{name} must be True or False, got {value!r} ({type(value).__name__}).')
    return bool(value)


def checked_steps(name: str, value: Any, least: int) -> int:
    """Returns `value` as an int of at least `least`. It shapes a program, so arrays are refused."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f'{name} must be a Python integer, got an array. Under optax.inject_hyperparams name '
            'it in static_args, or use rmsprop_jax.inject_hyperparams.'
        )
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}.')
    return int(value)


def compiled_pattern(name: str, pattern: Any, flags: int = 0) -> re.Pattern[str]:
    """Returns the compiled `pattern`; raises if it is not a regular expression."""
    if not isinstance(pattern, str):
        raise TypeError(f'{name} must be a regular expression, got {pattern!r}.')
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f'{name} is not a regular expression: {error}.') from None


def checked_transformation(name: str, value: Any) -> Any:
    """Returns `value`; raises if it does not have `init` and `update`."""
    if not (callable(getattr(value, 'init', None)) and callable(getattr(value, 'update', None))):
        raise TypeError(f'{name} must be a gradient transformation, got {value!r}.')
    return value


def checked_state(state: Any, kind: type) -> Any:
    """Returns `state`; raises if it is not of the kind that `init` returns."""
    if not isinstance(state, kind):
        raise TypeError(
            f'state must be the {kind.__name__} that init returned, got {type(state).__name__}.'
        )
    return state


def is_function(given: Any) -> bool:
    """Whether an argument is a function that returns a tree, rather than a tree.

    As in `optax.masked`, a tree that happens to be callable, such as an Equinox module of booleans,
    is a tree. An argument is a function only if all its leaves are callable.
    """
    leaves = jax.tree.leaves(given)
    return bool(leaves) and all(map(callable, leaves))


def checked_mask(name: str, mask: Any) -> Any:
    """Returns `mask`, which may be None, a tree of booleans or a function that returns one.

    `whole_mask` checks what the function returns.
    """
    if mask is not None and not is_function(mask):
        for path, value in tree_flatten_with_path(mask)[0]:
            checked_flag(f'{name}{keystr(path)}', value)
    return mask


def whole_mask(name: str, mask: Any, tree: Any) -> Any:
    """A boolean for each leaf of `tree`, from a prefix of it or a function that returns one."""
    if is_function(mask):
        mask = mask(tree)
        if is_function(mask):
            raise TypeError(f'{name} must return a tree of booleans, but returned a function.')
    return broadcast_prefix(name, checked_mask(name, mask), tree)


def broadcast_prefix(name: str, prefix: Any, tree: Any) -> Any:
    """Broadcasts `prefix` to the structure of `tree`, which is the parameters' structure."""
    try:
        return jax.tree.broadcast(prefix, tree)
    except ValueError as error:
        raise ValueError(f'{name} is neither like params nor a prefix of them: {error}') from None


def leaves_with_path(name: str, tree: Any) -> list[tuple[Any, Any]]:
    """The leaves of a tree with their key paths; raises if keys cannot be sorted."""
    try:
        return tree_flatten_with_path(tree)[0]
    except (TypeError, ValueError) as error:
        raise ValueError(f'{name} is not a tree: {error}') from None


def checked_leaves(name: str, tree: Any) -> list[tuple[Any, Any]]:
    """The leaves of a tree with their key paths; raises if one is not an array."""
    leaves = leaves_with_path(name, tree)
    for path, leaf in leaves:
        leaf_dtype(f'{name}{keystr(path)}', leaf)
    return leaves


def leaf_dtype(name: str, leaf: Any) -> np.dtype:
    """The dtype of an array, or of a value that JAX accepts as an array."""
    try:
        # NumPy would take text for the name of a dtype.
        if not isinstance(leaf, str | bytes):
            return leaf.dtype if hasattr(leaf, 'dtype') else jnp.result_type(leaf)
    except (TypeError, ValueError):
        pass
    raise TypeError(f'{name} is a {type(leaf).__name__}, not an array.')


def checked_updates(updates: Any) -> Any:
    """Returns `updates`; raises if a leaf is not floating or complex."""
    for path, g in tree_flatten_with_path(updates)[0]:
        inexact_dtype(f'updates{keystr(path)}', g)
    return updates


def checked_params(user: str, updates: Any, params: Any) -> Any:
    """Returns `params`, which `user` needs; raises if it is None or not like `updates`."""
    if params is None:
        raise ValueError(f'{user} needs params: call update(updates, state, params).')
    check_alike('params', params, 'updates', updates)
    return params


def check_alike(name: str, tree: Any, other_name: str, other: Any) -> None:
    """Raises if two trees differ in structure, or in the shape of a leaf."""
    if jax.tree.structure(tree) != jax.tree.structure(other):
        raise ValueError(_structure_difference(name, tree, other_name, other))
    for (path, x), y in zip(checked_leaves(name, tree), jax.tree.leaves(other), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f'{name}{keystr(path)} has shape {jnp.shape(x)}, but {other_name} has '
                f'{jnp.shape(y)} there.'
            )


def inexact_dtype(name: str, leaf: Any) -> np.dtype:
    dtype = leaf_dtype(name, leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f'{name} has dtype {dtype}, but RMSProp needs floating or complex leaves. Leave it out '
            'with optax.masked or optax.partition.'
        )
    return dtype


def matched(treedef: Any, updates: Any, moment: Any) -> list[Any]:
    try:
        return treedef.flatten_up_to(moment)
    except (ValueError, TypeError):
        raise ValueError(_structure_difference('updates', updates, 'the state', moment)) from None


def _structure_difference(name: str, tree: Any, other_name: str, other: Any) -> str:
    here, there = _paths(tree), _paths(other)
    lines = [f'the structure of {name} does not match that of {other_name}.']
    lines += [f'  only in {name}: {_listed(here - there)}'] * bool(here - there)
    lines += [f'  only in {other_name}: {_listed(there - here)}'] * bool(there - here)
    lines += [f'  {name}: {jax.tree.structure(tree)}']
    lines += [f'  {other_name}: {jax.tree.structure(other)}']
    return '\n'.join(lines)


def _paths(tree: Any) -> set[str]:
    return {keystr(path) or 'a single leaf' for path, _ in tree_flatten_with_path(tree)[0]}


def _listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    more = [f'and {len(ordered) - most} more'] * (len(ordered) > most)
    return ', '.join(ordered[:most] + more)


def check_kind(name: str, g: Any, other: Any) -> None:
    """Raises if only one of a gradient and its parameter or statistic is complex."""
    if jnp.iscomplexobj(g) != jnp.iscomplexobj(other):
        raise TypeError(
            f'{name} has dtype {jnp.result_type(g)}, but its parameter or state is '
            f'{jnp.result_type(other)}.'
        )
