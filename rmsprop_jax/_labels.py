"""`labels_by_path`: groups of parameters, from patterns that match their paths."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from rmsprop_jax._checks import compiled_pattern, leaves_with_path
from rmsprop_jax._types import path_name


def labels_by_path(patterns: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Labels for `optax.partition`, or a mask, from the paths of parameters.

    ::

        label of a parameter = patterns[the first pattern found in its path]

    A path joins the names that lead to a parameter with slashes: `layers/0/kernel`. It is the same
    for an `nnx.State`, a Linen dictionary and an Equinox module with the same names.

    Args:
      patterns: A mapping from regular expressions to labels, in the order in which they are tried.
        A pattern may match anywhere in a path (`re.search`), so an empty pattern at the end matches
        all remaining parameters. A label can be anything: a group name for `optax.partition`, a
        boolean for a `mask`.

    Returns:
      A function from a tree of parameters to a tree of labels like it. It raises a `ValueError`
      that names a parameter that no pattern matches, or a pattern that is not the first match of
      any parameter.

    Raises:
      TypeError: If `patterns` is not a mapping with strings as keys.
      ValueError: If a pattern is not a regular expression.

    Example:
      >>> import jax.numpy as jnp, optax, rmsprop_jax
      >>> params = {'body': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}, 'head': jnp.ones(2)}
      >>> labels = rmsprop_jax.labels_by_path({'^head': 'fast', 'bias$': 'frozen', '': 'slow'})
      >>> labels(params)
      {'body': {'bias': 'frozen', 'kernel': 'slow'}, 'head': 'fast'}
      >>> groups = {
      ...     'fast': rmsprop_jax.rmsprop(1e-2),
      ...     'slow': rmsprop_jax.rmsprop(1e-3),
      ...     'frozen': optax.set_to_zero(),
      ... }
      >>> tx = optax.partition(groups, labels)
    """
    if not isinstance(patterns, Mapping) or not all(isinstance(x, str) for x in patterns):
        raise TypeError(
            f'patterns must be a mapping from regular expressions to labels, got {patterns!r}.'
        )
    compiled = {x: compiled_pattern(f'the pattern {x!r}', x) for x in patterns}

    def labels(params: Any) -> Any:
        leaves_with_path('params', params)
        leaves, treedef = tree_flatten_with_path(params)
        found = [_first_match(compiled, path) for path, _ in leaves]
        unused = [pattern for pattern in patterns if pattern not in found]
        # Optax also asks for the labels of a tree without leaves, where no pattern can match.
        if unused and leaves:
            raise ValueError(
                f'the pattern {unused[0]!r} is not the first match of any parameter. The '
                'parameters are '
                f'{", ".join(repr(path_name(path)) for path, _ in leaves)}.'
            )
        return jax.tree.unflatten(treedef, [patterns[pattern] for pattern in found])

    return labels


def _first_match(patterns: Mapping[str, re.Pattern[str]], path: Any) -> str:
    name = path_name(path)
    for pattern, compiled in patterns.items():
        if compiled.search(name):
            return pattern
    raise ValueError(
        f'params{keystr(path)} has the path {name!r}, which no pattern matches: add a pattern, or '
        "the empty pattern '' at the end for all remaining parameters."
    )
