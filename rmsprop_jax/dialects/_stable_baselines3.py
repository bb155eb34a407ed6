"""Stable-Baselines3."""

from typing import Any

from rmsprop_jax._optimizer import precise_chain, scale_by_learning_rate
from rmsprop_jax._precondition import rms_step
from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import Optimizer, coupled_decay, momentum_step
from rmsprop_jax.storage._choice import Storage


@Dialect(
    title='`RMSpropTFLike`',
    rules=(Rule(start=('one',), learning_rate=('after momentum',), weight_decay=('coupled',)),),
)
def stable_baselines3(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0,
    momentum: ScalarOrSchedule = 0,
    centered: bool = False,
    *,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """Stable-Baselines3's `RMSpropTFLike`: TensorFlow's root and start, PyTorch's momentum.

    ::

        g  <- g + weight_decay p
        nu <- alpha nu + (1 - alpha) g^2          from 1
        b  <- momentum b + g / sqrt(nu + eps);  p <- p - lr b

    The arguments are the same as for `torch`, except that `eps` is inside the root and thus in the
    squared unit of the gradient.

    Source: Stable-Baselines3 2.9, stable_baselines3/common/sb2_compat/rmsprop_tf_like.py.
    """
    return precise_chain(
        coupled_decay(weight_decay, mask),
        rms_step(alpha, eps, initial_scale=1.0, centered=centered, storage=storage),
        momentum_step(momentum, storage),
        scale_by_learning_rate(lr),
    )
