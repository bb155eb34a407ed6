"""The Keras of TensorFlow 2.0 to 2.10."""

import math
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_mask
from rmsprop_jax._optimizer import precise_chain, rmsprop
from rmsprop_jax._transforms import skip_zero_rows
from rmsprop_jax._types import Hyperparameter, ScalarOrSchedule, cast, is_none_or_zero
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import NAME, Optimizer, clipping
from rmsprop_jax.storage._choice import Storage


@Dialect(
    rules=(
        Rule(epsilon=('outside the root',), momentum=('none',), when='no momentum'),
        Rule(momentum=('heavy ball',), when='momentum'),
    ),
    refused={'name': NAME, 'lr': 'use learning_rate'},
)
def keras_legacy(
    learning_rate: ScalarOrSchedule = 1e-3,
    rho: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule | None = 1e-7,
    centered: bool = False,
    *,
    clipnorm: ArrayLike | None = None,
    clipvalue: ArrayLike | None = None,
    global_clipnorm: ArrayLike | None = None,
    decay: ScalarOrSchedule = 0.0,
    sparse: Any = False,
    storage: Storage | None = None,
) -> Optimizer:
    """`tf.keras.optimizers.RMSprop` of TensorFlow 2.0 to 2.10 (OptimizerV2), now in `tf_keras`.

    Without momentum, epsilon is outside the root. With momentum, TensorFlow's fused kernel takes
    over and adds it inside::

        nu <- rho nu + (1 - rho) g^2                                        from 0
        p  <- p - learning_rate g / (sqrt(nu) + epsilon)                    without momentum
        b  <- momentum b + learning_rate g / sqrt(nu + epsilon);  p <- p - b      with momentum

    An array counts as momentum whatever its value, as in TensorFlow.

    Args:
      learning_rate: Step size, in the unit of the parameter.
      rho: Weight of the past in the running averages, in [0, 1].
      momentum: Decay of the velocity, in [0, 1]; a Python zero means no velocity.
      epsilon: In the unit of the gradient; with momentum, in its squared unit. As in TensorFlow, a
        Python zero or None means 1e-7.
      centered: Whether to divide by the standard deviation.
      clipnorm: Maximum norm of each gradient array.
      clipvalue: Maximum magnitude of each entry; applied before `clipnorm` or `global_clipnorm`.
      global_clipnorm: Maximum norm of all gradients together; not allowed with `clipnorm`.
      decay: The learning rate is divided by `1 + decay step`.
      sparse: Which gradients TensorFlow would receive as `IndexedSlices`; see `tensorflow`. It has
        an effect only with momentum, where TensorFlow's kernel skips rows that were not looked up.
        Without momentum, the statistics of these rows decay like all others.
      storage: How the statistics are kept in memory, as in `rmsprop`.

    tf_keras clips the gradient of each lookup before it adds the gradients of a row. A dense
    gradient holds only their sum: where ids repeat within a step, `clipnorm`, `clipvalue` and
    `global_clipnorm` cannot be reproduced here.

    Source: tf_keras 2.21, tf_keras/src/optimizers/legacy/rmsprop.py and optimizer_v2.py.
    """
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError('give clipnorm or global_clipnorm, not both.')
    plain = is_none_or_zero(momentum)
    sparse = checked_mask('sparse', sparse)
    dense = precise_chain(
        clipping(clipvalue=clipvalue),
        clipping(clipnorm=clipnorm, global_clipnorm=global_clipnorm),
        rmsprop(
            learning_rate if is_none_or_zero(decay) else _inverse_time_decay(learning_rate, decay),
            rho,
            1e-7 if epsilon is None or is_none_or_zero(epsilon) else epsilon,
            eps_in_sqrt=not plain,
            centered=centered,
            momentum=None if plain else momentum,
            storage=storage,
        ),
    )
    return dense if plain or sparse is False else skip_zero_rows(dense, sparse)


def _inverse_time_decay(learning_rate: ScalarOrSchedule, decay: ScalarOrSchedule) -> Any:
    rate = Hyperparameter('learning_rate', learning_rate, lower=-math.inf)
    slope = Hyperparameter('decay', decay)

    def at(count: ArrayLike) -> Any:
        time = jnp.asarray(count, float)
        return cast(rate.at(count), time.dtype) / (1.0 + cast(slope.at(count), time.dtype) * time)

    return at
