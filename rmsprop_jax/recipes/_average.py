"""The average of the weights that some sources evaluate, beside the optimizer."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_map_with_path
from jax.typing import ArrayLike

from rmsprop_jax._lift import KeyPath
from rmsprop_jax._moments import componentwise
from rmsprop_jax._types import (
    Hyperparameter,
    Scalar,
    cast,
    checked_leaves,
    decay_rate,
    leaf_dtype,
    wide_dtype,
)


def ema_init(values: Any) -> Any:
    """What `ema_update` starts from, as its sources do: a copy of the values.

    Floating and complex leaves are held in float32 or wider.
    """

    def leaf(path: KeyPath, value: Any) -> jax.Array:
        dtype = leaf_dtype(f'values{keystr(path)}', value)
        wide = wide_dtype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else dtype
        return jnp.array(value, wide)

    return tree_map_with_path(leaf, values)


def ema_update(average: Any, values: Any, count: ArrayLike | None, decay: ArrayLike) -> Any:
    """A step of an exponential moving average, over any tree of arrays.

    ::

        average <- average + (1 - d) (values - average)
        d        = decay                                    where count is None
        d        = min(decay, (1 + count) / (10 + count))   otherwise

    The first form is timm's; the second TensorFlow's, with `num_updates`, whose average follows the
    weights closely at first. Average batch statistics along with the parameters, as both sources
    do: give a tuple of the two, or the whole `nnx.State`. Call it after the optimizer's step, also
    under `jax.jit` or in a scan, and evaluate with the average cast to the values' dtypes.

    Args:
      average: What `ema_init` or the last call returned.
      values: The parameters after the step, and whatever is averaged with them. Leaves that are
        not floating or complex, such as counters, are copied.
      count: The number of steps taken, this one included, or None.
      decay: In [0, 1], a Python number or a scalar array of float32 or wider.

    Returns:
      The new average, in float32 or wider.

    Raises:
      ValueError: For trees or leaves that differ in structure or shape, or a number out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> average = recipes.ema_init(jnp.zeros(()))
      >>> print(recipes.ema_update(average, jnp.ones(()), None, decay=0.75))
      0.25
      >>> print(recipes.ema_update(average, jnp.ones(()), 8, decay=0.75))  # d = 9 / 18
      0.5

    Source: tensorflow/tensorflow 0004ac9, tensorflow/python/training/moving_averages.py,
    ExponentialMovingAverage.apply; huggingface/pytorch-image-models 0a044bf,
    timm/utils/model_ema.py, ModelEmaV2 and V3.
    """
    rest = _share(count, decay)
    here, there = jax.tree.structure(values), jax.tree.structure(average)
    if here != there:
        raise ValueError(f'values and average differ in structure:\n  {here}\n  {there}')

    checked_leaves('values', values)
    checked_leaves('average', average)

    def leaf(path: KeyPath, a: Any, v: Any) -> Any:
        if jnp.shape(a) != jnp.shape(v):
            raise ValueError(
                f'values{keystr(path)} has shape {jnp.shape(v)}, but its average {jnp.shape(a)}.'
            )
        if not jnp.issubdtype(jnp.result_type(v), jnp.inexact):
            return jnp.array(v)
        a = jnp.asarray(a, wide_dtype(jnp.result_type(a)))
        return a + componentwise(
            operator.mul, jnp.asarray(v, a.dtype) - a, cast(rest, a.real.dtype)
        )

    return tree_map_with_path(leaf, average, values)


def _share(count: ArrayLike | None, decay: ArrayLike) -> Scalar:
    """The weight of the new values, `1 - d`."""
    if callable(decay):
        raise TypeError('decay cannot be a schedule.')
    _, rest = decay_rate('decay', decay).with_complement_at(0)
    if count is None:
        return rest
    taken = jnp.asarray(Hyperparameter('count', count).value, float)
    # 1 - (1 + n) / (10 + n), without the subtraction.
    return jnp.maximum(cast(rest, float), 9.0 / (10.0 + taken))
