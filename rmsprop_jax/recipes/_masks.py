"""Which parameters decay, by the paths of a tree, in a form that can be printed and checked."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_map_with_path

from rmsprop_jax._types import canonical, checked_leaves, checked_mask, whole_mask

BATCH_NORM = r'batch_?norm|(^|_)bn(?![a-z])'
DEPTHWISE = r'depthwise'


def tensorflow_decay_mask(params: Any, batch_norm: str = BATCH_NORM) -> Any:
    """Everything but batch normalisation: the rule of the EfficientNet and MnasNet code.

    That code leaves out variables with 'batch_normalization' in their name; biases of other layers
    do decay. Here a variable is left out if a part of its path matches a pattern, which finds
    `BatchNorm_0`, `batch_normalization_3`, `bn`, `bn1` and `expand_bn`. A layer called `norm` is
    not recognised: pass another pattern, with `functools.partial`, and look at `describe_mask`.

    Args:
      params: Any tree of arrays, or of their shapes: dictionaries, Flax variables, `nnx.State`.
      batch_norm: A regular expression, searched in each part of a path, in upper or lower case.

    Returns:
      A tree of booleans like `params`, True for what decays.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> params = {'bn1': {'scale': jnp.ones(4)}, 'dense': {'bias': jnp.ones(4)}}
      >>> recipes.tensorflow_decay_mask(params)
      {'bn1': {'scale': False}, 'dense': {'bias': True}}
    """
    pattern = _pattern('batch_norm', batch_norm)
    return _by_path(lambda path, _: not _matches(pattern, path), params)


def slim_decay_mask(params: Any, depthwise: str = DEPTHWISE) -> Any:
    """Weights of convolutions, depthwise ones excepted, and of dense layers: TF-Slim's rule.

    That is, arrays of at least two axes whose path does not match `depthwise`, a regular expression
    searched as in `tensorflow_decay_mask`. Name the depthwise layers so, or pass their names.
    """

    pattern = _pattern('depthwise', depthwise)

    def decays(path: Any, leaf: Any) -> bool:
        return np.ndim(leaf) >= 2 and not _matches(pattern, path)

    return _by_path(decays, params)


def timm_decay_mask(params: Any) -> Any:
    """Arrays of at least two axes that are not called `bias`: the rule of timm."""
    return _by_path(lambda path, leaf: np.ndim(leaf) >= 2 and _parts(path)[-1:] != ['bias'], params)


def describe_mask(params: Any, mask: Any) -> str:
    """A line for each parameter: its path, its shape, and whether it decays.

    Args:
      params: Any tree of arrays.
      mask: What an optimizer takes as `mask`: a function of the parameters, a tree of booleans like
        them or a prefix of it, or None for all.

    Raises:
      TypeError: If the mask holds anything but booleans, or a parameter is no array.
      ValueError: If the mask is neither like the parameters nor a prefix of them.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> params = {'conv': {'kernel': jnp.ones((3, 3, 1, 8)), 'bias': jnp.ones(8)}}
      >>> print(recipes.describe_mask(params, recipes.timm_decay_mask))
      conv/bias    (8,)          not decayed
      conv/kernel  (3, 3, 1, 8)  decayed
    """
    leaves = checked_leaves('params', params)
    flags = jax.tree.leaves(
        whole_mask('mask', True if mask is None else checked_mask('mask', mask), params)
    )
    rows = []
    for (path, leaf), decays in zip(leaves, flags, strict=True):
        name = '/'.join(_parts(path))
        rows.append((name, str(np.shape(leaf)), 'decayed' if decays else 'not decayed'))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return '\n'.join(f'{a:{widths[0]}}  {b:{widths[1]}}  {c}' for a, b, c in rows)


def _by_path(decays: Callable[[Any, Any], bool], params: Any) -> Any:
    checked_leaves('params', params)
    return tree_map_with_path(decays, params)


def _pattern(name: str, pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f'{name} must be a regular expression, got {pattern!r}.')
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f'{name} is no regular expression: {error}.') from None


def _matches(pattern: re.Pattern[str], path: Any) -> bool:
    return any(pattern.search(part) for part in _parts(path))


def _parts(path: Any) -> list[str]:
    """The names on the way to a leaf, without the `value` that nnx's variables add."""
    return [keystr((key,), simple=True) for key in canonical(path)]
