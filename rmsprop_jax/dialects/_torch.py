"""PyTorch."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_flag
from rmsprop_jax._core.chains import in_accumulator_precision, precise_chain
from rmsprop_jax._core.moments import magnitude, root_or_zero
from rmsprop_jax._optimizer import scale_by_learning_rate
from rmsprop_jax._precondition import rms_step
from rmsprop_jax._transforms import norm_of, scaled
from rmsprop_jax._types import ScalarOrSchedule, constant
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import XLA, Optimizer, checked, coupled_decay, momentum_step
from rmsprop_jax.storage._choice import Storage


@Dialect(
    rules=(
        Rule(
            epsilon=('outside the root',),
            learning_rate=('after momentum',),
            weight_decay=('coupled',),
        ),
    ),
    refused={
        'foreach': XLA,
        'capturable': XLA,
        'differentiable': 'every transformation here is differentiable: leave it out',
    },
)
def torch(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0,
    momentum: ScalarOrSchedule = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """`torch.optim.RMSprop`: epsilon outside the root, learning rate after momentum.

    ::

        g  <- -g                                where maximize
        g  <- g + weight_decay p
        nu <- alpha nu + (1 - alpha) g^2        from 0
        b  <- momentum b + g / (sqrt(nu) + eps)
        p  <- p - lr b

    Complex parameters are treated as pairs of reals, each with its own second moment.

    Args:
      lr: Learning rate, in the unit of the parameter.
      alpha: Weight of the past in the running averages, in [0, 1].
      eps: Added to the root, in the unit of the gradient.
      weight_decay: L2 penalty, added to the gradient after `maximize` has flipped it.
      momentum: Decay of the velocity, in [0, 1]; a Python zero means no velocity.
      centered: Whether to divide by the standard deviation.
      maximize: Whether to maximize the objective.
      mask: Which parameters decay, as in `optax.add_decayed_weights`.
      storage: How the statistics are kept in memory, as in `rmsprop`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> tx = dialects.torch(lr=0.1, momentum=0.9)
      >>> update, _ = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
      >>> round(float(update), 4)
      -1.0

    Source: PyTorch 2.13 to 2.15, torch/optim/rmsprop.py.
    """
    return precise_chain(
        optax.scale(-1.0) if checked_flag('maximize', maximize) else None,
        coupled_decay(weight_decay, mask),
        rms_step(alpha, eps, eps_in_sqrt=False, centered=centered, storage=storage, of_pairs=True),
        momentum_step(momentum, storage, of_pairs=True),
        scale_by_learning_rate(lr),
    )


@functools.partial(
    checked,
    refused={'foreach': XLA, 'error_if_nonfinite': 'wrap the optimizer in optax.apply_if_finite'},
)
def torch_clip_grad_norm(max_norm: ArrayLike, norm_type: float = 2.0) -> Optimizer:
    """`torch.nn.utils.clip_grad_norm_`: `g <- g min(1, max_norm / (norm + 1e-6))`.

    Optax's `clip_by_global_norm` divides by the norm alone, so it does not reproduce a clipped
    PyTorch run exactly.

    Args:
      max_norm: The maximum norm of all gradients together, in the unit of the gradient.
      norm_type: The order of the norm, positive; `math.inf` takes the largest magnitude.

    Raises:
      ValueError: If the order is not positive. PyTorch accepts such an order, but it does not
        define a norm.

    Source: PyTorch 2.13 to 2.15, torch/nn/utils/clip_grad.py.
    """
    limit = constant('max_norm', max_norm)
    if not isinstance(norm_type, int | float | np.number) or isinstance(norm_type, bool):
        raise TypeError(f'norm_type must be a number, got {norm_type!r}.')
    if not norm_type > 0:
        raise ValueError(f'norm_type must be positive, got {norm_type!r}.')

    def clip(updates: optax.Updates, _: Any) -> optax.Updates:
        magnitudes = [magnitude(g) for g in jax.tree.leaves(updates)]
        if math.isinf(norm_type):
            norm = functools.reduce(jnp.maximum, [x.max(initial=0) for x in magnitudes], 0.0)
        elif norm_type == 2:
            norm = norm_of(updates)
        else:
            total = sum((jnp.sum(_power(x, norm_type)) for x in magnitudes), jnp.float32(0))
            norm = root_or_zero(total, norm_type)
        return scaled(updates, jnp.minimum(1.0, limit / (norm + 1e-6)))

    return in_accumulator_precision(optax.stateless(clip))


def _power(x: jax.Array, order: float) -> jax.Array:
    """`x^order`, differentiable at zero also for orders below one."""
    vanishes = x == 0
    return jnp.where(vanishes, 0, jnp.where(vanishes, 1, x) ** order)
