"""tf_keras, the Keras of TensorFlow 2.11 to 2.15."""

from typing import Any

from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_flag
from rmsprop_jax._core.chains import chain
from rmsprop_jax._optimizer import precise_chain
from rmsprop_jax._transforms import average_parameters
from rmsprop_jax._types import ScalarOrSchedule, is_none_or_zero
from rmsprop_jax.dialects._keras import RULE, keras
from rmsprop_jax.dialects._record import Dialect
from rmsprop_jax.dialects._shared import NAME, XLA, Optimizer, clipping_unless_zero
from rmsprop_jax.storage._choice import Storage


@Dialect(
    title='TensorFlow 2.11 to 2.15',
    rules=(RULE,),
    refused={
        'name': NAME,
        'jit_compile': XLA,
        'lr': 'tf_keras warns and ignores it: use learning_rate',
        'decay': 'tf_keras refuses it too: use a schedule, or keras_legacy',
    },
    twin='keras',
)
def tf_keras(
    learning_rate: ScalarOrSchedule = 1e-3,
    rho: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-7,
    centered: bool = False,
    weight_decay: ScalarOrSchedule | None = None,
    clipnorm: ArrayLike | None = None,
    clipvalue: ArrayLike | None = None,
    global_clipnorm: ArrayLike | None = None,
    use_ema: bool = False,
    ema_momentum: ScalarOrSchedule = 0.99,
    ema_overwrite_frequency: int | None = 100,
    *,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """`tf.keras.optimizers.RMSprop` of TensorFlow 2.11 to 2.15, now `tf_keras.optimizers.RMSprop`.

    The rule is the same as in `keras`, but the average of the weights starts at the parameters::

        a  <- ema_momentum a + (1 - ema_momentum) p     in the first step from p before that step
        p  <- a                                       every ema_overwrite_frequency, 100 by default

    At its end, `fit` replaces the parameters by the average once more (`finalize_variable_values`).
    Here, take `optax.tree.get(state, 'ema')` as the final parameters. With `use_ema` this must be
    the last transformation of a chain, and `update` needs `params`.

    In tf_keras, sparse gradients of embeddings move all rows, as dense ones do. Where an index is
    repeated, clipping differs, since tf_keras clips the gradients before it adds them up.

    The other arguments are the same as for `keras`, without a loss scale and accumulation.

    Args:
      clipnorm: Not allowed with `global_clipnorm`.
      clipvalue: Ignored if `clipnorm` or `global_clipnorm` clips, as in tf_keras.
      ema_overwrite_frequency: None or a Python zero for never.

    Raises:
      ValueError: If both `clipnorm` and `global_clipnorm` are given.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> tx = dialects.tf_keras(
      ...     0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2
      ... )
      >>> p = jnp.ones(())
      >>> state = tx.init(p)
      >>> for _ in range(2):
      ...     update, state = tx.update(jnp.ones(()), state, p)
      ...     p += update
      >>> print(f'{p:.4f}')  # Keras 3 would be at 0.6611.
      0.9170

    Source: tf_keras 2.21, tf_keras/src/optimizers/optimizer.py and rmsprop.py.
    """
    by_norm = clipping_unless_zero(clipnorm=clipnorm, global_clipnorm=global_clipnorm)
    by_value = clipping_unless_zero(clipvalue=clipvalue)
    step = precise_chain(
        by_value if by_norm is None else by_norm,
        keras(
            learning_rate,
            rho,
            momentum,
            epsilon,
            centered,
            weight_decay,
            mask=mask,
            storage=storage,
        ),
    )
    if not checked_flag('use_ema', use_ema):
        return step
    never = ema_overwrite_frequency is None or is_none_or_zero(ema_overwrite_frequency)
    frequency = None if never else ema_overwrite_frequency
    return chain(step, average_parameters(ema_momentum, frequency, from_start=True))
