"""Masks that choose by path which parameters decay, and a function that prints them."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

from rmsprop_jax._checks import checked_leaves, checked_mask, whole_mask
from rmsprop_jax._types import canonical, path_name

BATCH_NORM = r'batch_?norm|(^|_)bn(?![a-z])'
DEPTHWISE = r'depthwise'
# Names of normalisation layers' weights, either whole or at the end of a name with slashes.
_OF_A_NORM = re.compile(r'(^|[/.])(scale|gamma|beta)(:\d+)?$', re.IGNORECASE)


def tensorflow_decay_mask(params: Any, batch_norm: str = BATCH_NORM) -> Any:
    """Everything but batch normalisation: the rule of the EfficientNet and MnasNet code.

    That code leaves out variables with 'batch_normalization' in their name; biases of other layers
    do decay. Here a variable is left out if a part of its path matches a pattern. The default
    pattern finds `BatchNorm_0`, `batch_normalization_3`, `bn`, `bn1` and `expand_bn`. It does not
    find a layer called `norm`: pass another pattern with `functools.partial`, and check the result
    with `describe_mask`.

    Args:
      params: Any tree of arrays, or of their shapes: dictionaries, Flax variables, `nnx.State`.
      batch_norm: A regular expression to search for in each part of a path, ignoring case.

    Returns:
      A tree of booleans like `params`, True for each parameter that decays.

    Warns:
      UserWarning: If no path matches, so that everything decays, although a parameter is called
        `scale`, `gamma` or `beta`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> params = {'bn1': {'scale': jnp.ones(4)}, 'dense': {'bias': jnp.ones(4)}}
      >>> recipes.tensorflow_decay_mask(params)
      {'bn1': {'scale': False}, 'dense': {'bias': True}}
    """
    pattern = _pattern('batch_norm', batch_norm)
    found = _by_path(lambda path, _: not _matches(pattern, path), params)
    if all(jax.tree.leaves(found)):
        norms = [path for path in _paths(params) if _OF_A_NORM.search(path[-1])]
        _warn_unless_empty('tensorflow_decay_mask', 'batch_norm', batch_norm, norms)
    return found


def slim_decay_mask(params: Any, depthwise: str = DEPTHWISE) -> Any:
    """Weights of dense layers and of convolutions that are not depthwise: TF-Slim's rule.

    These are the arrays of at least two axes whose path does not match `depthwise`, a regular
    expression that is searched for as in `tensorflow_decay_mask`. If the names of your depthwise
    layers do not contain this word, pass a pattern that matches them.

    Warns:
      UserWarning: If no path matches, although two or more arrays have the shape of a depthwise
        kernel, `(height, width, 1, channels)`.
    """

    pattern = _pattern('depthwise', depthwise)

    def decays(path: Any, leaf: Any) -> bool:
        return np.ndim(leaf) >= 2 and not _matches(pattern, path)

    found = _by_path(decays, params)
    paths = _paths(params)
    if not any(pattern.search(part) for path in paths for part in path):
        shapes = map(np.shape, jax.tree.leaves(params))
        kernels = [path for path, shape in zip(paths, shapes, strict=True) if _is_depthwise(shape)]
        # A single one may be the first convolution of a network for grey images.
        _warn_unless_empty('slim_decay_mask', 'depthwise', depthwise, kernels[1:])
    return found


def timm_decay_mask(params: Any) -> Any:
    """Arrays of at least two axes that are not called `bias`: the rule of timm."""
    return _by_path(lambda path, leaf: np.ndim(leaf) >= 2 and _parts(path)[-1:] != ['bias'], params)


def describe_mask(params: Any, mask: Any) -> str:
    """A line for each parameter: its path, its shape, and whether it decays.

    Args:
      params: Any tree of arrays.
      mask: The `mask` of an optimizer: a tree of booleans like the parameters, a prefix of such a
        tree, a function from the parameters to one, or None for all.

    Raises:
      TypeError: If the mask holds anything but booleans, or a parameter is not an array.
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
    rows = [
        (path_name(path), str(np.shape(leaf)), 'decayed' if decays else 'not decayed')
        for (path, leaf), decays in zip(leaves, flags, strict=True)
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return '\n'.join(f'{a:{widths[0]}}  {b:{widths[1]}}  {c}' for a, b, c in rows)


def _by_path(decays: Callable[[Any, Any], bool], params: Any) -> Any:
    checked_leaves('params', params)
    return tree_map_with_path(decays, params)


def _paths(params: Any) -> list[list[str]]:
    """The parts of each leaf's path; a tree that is one leaf has one empty part."""
    return [_parts(path) or [''] for path, _ in tree_flatten_with_path(params)[0]]


def _is_depthwise(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[-2] == 1 < shape[-1]


def _warn_unless_empty(mask: str, argument: str, pattern: str, suspects: list[list[str]]) -> None:
    """Warns that a pattern matched nothing, although it probably should match `suspects`."""
    if suspects:
        warnings.warn(
            f'{mask} found nothing that matches {argument}={pattern!r}, and so lets '
            f'{"/".join(suspects[0])!r} decay. If that should not decay, give {argument} a pattern '
            'that matches its path.',
            stacklevel=3,
        )


def _pattern(name: str, pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f'{name} must be a regular expression, got {pattern!r}.')
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f'{name} is not a regular expression: {error}.') from None


def _matches(pattern: re.Pattern[str], path: Any) -> bool:
    return any(pattern.search(part) for part in _parts(path))


def _parts(path: Any) -> list[str]:
    """The names along a leaf's path, without the `value` that nnx's variables add."""
    return [keystr((key,), simple=True) for key in canonical(path)]
