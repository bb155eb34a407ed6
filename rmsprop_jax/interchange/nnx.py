"""Flax NNX: puts a converted state into an existing `nnx.Optimizer`.

The conversions take `nnx.state(model, nnx.Param)` as parameters and `optimizer.opt_state` as a
state. Flax offers nothing for the last step: `optimizer.opt_state = state` and
`nnx.update(optimizer.opt_state, state)` both fail.
"""

from typing import Any

import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr, tree_map_with_path

from rmsprop_jax._checks import checked_leaves, leaf_dtype
from rmsprop_jax._command import install
from rmsprop_jax.interchange._mapping import InterchangeError

__all__ = ['set_state']
__dir__ = __all__.copy

_VALUE = GetAttrKey('value')


def set_state(optimizer: Any, state: Any) -> None:
    """Puts an optimizer state into an `nnx.Optimizer`, whose next update continues from it.

    Everything is checked before anything changes. This also works under `nnx.jit`.

    `optimizer.step`, Flax's own count, which no transformation reads, does not change. Set it with
    `optimizer.step[...] = count`.

    Args:
      optimizer: The `nnx.Optimizer`.
      state: A state of its transformation, of arrays or of NNX variables: what `from_torch`, the
        transformation's `init` or `update`, or another optimizer's `opt_state` gives.

    Raises:
      InterchangeError: Listing every leaf that is missing, is left over, or differs in shape or
        dtype from that in the optimizer.
      TypeError: If `optimizer` is not an `nnx.Optimizer`, or a leaf of `state` is not an array.
      ImportError: If Flax is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, rmsprop_jax
      >>> from flax import nnx
      >>> from rmsprop_jax import interchange
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> tx = rmsprop_jax.rmsprop(0.1)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> params = nnx.state(model, nnx.Param)
      >>> _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
      >>> interchange.nnx.set_state(optimizer, state)
      >>> int(optimizer.opt_state[0].count[...])
      1

    Source: Flax 0.12.8, flax/nnx/training/optimizer.py.
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError(f'set_state needs Flax: {install("flax")}') from error
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(f'optimizer must be an nnx.Optimizer, got {type(optimizer).__name__}.')
    given, held = _by_path('state', state), _by_path('optimizer', optimizer.opt_state)
    problems = [f'{path!r} is missing' for path in held.keys() - given.keys()]
    problems += [f'{path!r} is not in the optimizer' for path in given.keys() - held.keys()]
    for path in held.keys() & given.keys():
        new, old = (_described(path, tree[path]) for tree in (given, held))
        if new != old:
            problems.append(f'{path!r} is {new} where the optimizer has {old}')
    if problems:
        raise InterchangeError('the state does not fit the optimizer', sorted(problems))
    new = tree_map_with_path(lambda path, _: jnp.asarray(given[_name(path)]), optimizer.opt_state)
    nnx.update(optimizer.opt_state, nnx.state(new))


def _by_path(name: str, tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in checked_leaves(name, tree)}


def _described(path: str, leaf: Any) -> str:
    return f'{leaf_dtype(path, leaf)}{list(jnp.shape(leaf))}'


def _name(path: tuple[Any, ...]) -> str:
    """A path without the `.value` of variables, which factored statistics have in its middle."""
    return keystr(tuple(key for key in path if key != _VALUE), simple=True, separator='/')
