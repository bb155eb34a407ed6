"""The average of the weights that some sources evaluate, kept beside the optimizer."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_map_with_path
from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_leaves, leaf_dtype
from rmsprop_jax._core.moments import componentwise
from rmsprop_jax._types import Hyperparameter, KeyPath, Scalar, cast, decay_rate, wide_dtype


def ema_init(values: Any) -> Any:
    """The average before the first `ema_update`: a copy of the values, as in its sources.

    Floating and complex leaves are held in float32 or wider.
    """

    def leaf(path: KeyPath, value: Any) -> jax.Array:
        dtype = leaf_dtype(f'values{keystr(path)}', value)
        wide = wide_dtype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else dtype
        return jnp.array(value, wide)

    return tree_map_with_path(leaf, values)


def ema_update(
    average: Any,
    values: Any,
    count: ArrayLike | None,
    decay: ArrayLike,
    *,
    copies: ArrayLike | None = None,
    warmup_power: ArrayLike | None = None,
) -> Any:
    """One step of an exponential moving average over any tree of arrays.

    ::

        average <- d average + (1 - d) values
        d        = decay                                                 count is None
        d        = min(decay, (1 + count) / (10 + count))                count alone
        d        = 0 while count <= copies, then decay                   count and copies
        d        = 0 while count <= copies, then                         and warmup_power
                   min(decay, 1 - (1 + count - copies)^-warmup_power)

    The sources use these forms of `d`:

    - TensorFlow's `ExponentialMovingAverage`: the second with `num_updates`, else the first.
    - timm's `ModelEma` and `ModelEmaV2`: the first.
    - timm's `ModelEmaV3`: with `step`, as in timm's script, `copies=1 + update_after_step` (1 by
      default), and with `use_warmup` also `warmup_power=2/3`. Without `step`, the first.
    - `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`: `copies=1`.
    - torchvision's references: `copies` is 1 plus the number of averaging updates in the warm-up.

    Average batch statistics along with the parameters, as these sources do: give a tuple of the
    two, or the whole `nnx.State`. (`AveragedModel` does so with `use_buffers=True`. Otherwise, take
    the newest statistics.) Call this function after the optimizer's step; it works under `jax.jit`
    and in a scan. To evaluate, cast the average to the values' dtypes.

    Args:
      average: The result of `ema_init` or of the last call.
      values: The parameters after the step, and whatever is averaged with them. Leaves that are
        not floating or complex, such as counters, are copied.
      count: The number of updates, including this one, or None. If you do not average at every
        step, count the updates of the average, as the sources do.
      decay: In [0, 1], a Python number or a scalar array of float32 or wider.
      copies: The number of updates, from the first on, that copy the values. Needs `count`.
      warmup_power: How fast the decay rises after the copies. Needs `copies`.

    Returns:
      The new average, in float32 or wider.

    Raises:
      ValueError: If trees differ in structure or leaves in shape, if a number is out of range, or
        if an argument is given without the one that it needs.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> average = recipes.ema_init(jnp.zeros(()))
      >>> print(recipes.ema_update(average, jnp.ones(()), None, decay=0.75))
      0.25
      >>> print(recipes.ema_update(average, jnp.ones(()), 8, decay=0.75))  # d = 9 / 18
      0.5
      >>> print(recipes.ema_update(average, jnp.ones(()), 1, decay=0.75, copies=1))  # d = 0
      1.0

    Source: tensorflow/tensorflow 0004ac9, tensorflow/python/training/moving_averages.py,
    ExponentialMovingAverage.apply; timm 1.0.31, timm/utils/model_ema.py, and train.py; PyTorch
    2.13, torch/optim/swa_utils.py; pytorch/vision 017e9b9, references/classification/train.py.
    """
    share = _share(count, decay, copies, warmup_power)
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
        v = jnp.asarray(v, a.dtype)
        moved = a + componentwise(operator.mul, v - a, cast(share, a.real.dtype))
        # A copy is exact, even if the average has overflowed.
        return jnp.where(share == 1, v, moved)

    return tree_map_with_path(leaf, average, values)


def _share(
    count: ArrayLike | None,
    decay: ArrayLike,
    copies: ArrayLike | None,
    warmup_power: ArrayLike | None,
) -> Scalar:
    """The weight of the new values, `1 - d`."""
    if callable(decay):
        raise TypeError('decay cannot be a schedule.')
    _, share = decay_rate('decay', decay).with_complement_at(0)
    if count is None and copies is not None:
        raise ValueError('copies needs count, the number of updates.')
    if copies is None and warmup_power is not None:
        raise ValueError('warmup_power needs copies; timm copies 1 update.')
    if count is None:
        return share

    def number(name: str, value: ArrayLike) -> Scalar:
        return jnp.asarray(Hyperparameter(name, value).value, float)

    share, taken = cast(share, float), number('count', count)
    if copies is None:
        # 1 - (1 + n) / (10 + n), without the subtraction.
        return jnp.maximum(share, 9.0 / (10.0 + taken))
    since = taken - number('copies', copies)
    if warmup_power is not None:
        power = number('warmup_power', warmup_power)
        share = jnp.maximum(share, (1.0 + jnp.maximum(since, 0.0)) ** -power)
    return jnp.where(since > 0, share, 1.0)
