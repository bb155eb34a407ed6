"""timm."""

import math
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_flag
from rmsprop_jax._optimizer import precise_chain, scale_by_learning_rate, subtract_decayed_weights
from rmsprop_jax._precondition import rms_step
from rmsprop_jax._transforms import cautious
from rmsprop_jax._types import Hyperparameter, ScalarOrSchedule, constant, is_none_or_zero
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import XLA, Optimizer, Step, coupled_decay, momentum_step
from rmsprop_jax.storage._choice import Storage


@Dialect(
    title='`RMSpropTF`',
    rules=(
        Rule(
            start=('one',),
            learning_rate=('before momentum', 'after momentum'),
            weight_decay=('coupled', 'decoupled'),
        ),
    ),
    refused={'foreach': XLA},
)
def timm(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-10,
    weight_decay: ScalarOrSchedule = 0,
    momentum: ScalarOrSchedule = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    *,
    max_lr: float | None = None,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """`timm.optim.RMSpropTF`: TensorFlow 1's rule with PyTorch's options.

    ::

        g  <- g + weight_decay p                  or, with decoupled_decay,
        p  <- p - lr weight_decay p               times lr / max_lr with corrected_weight_decay
        nu <- alpha nu + (1 - alpha) g^2          from 1
        b  <- momentum b + lr g / sqrt(nu + eps);  p <- p - b      lr outside b without
                                                                   lr_in_momentum

    Args:
      lr: Learning rate, in the unit of the parameter.
      alpha: Weight of the past in the running averages, in [0, 1].
      eps: Added inside the root, in the squared unit of the gradient.
      weight_decay: L2 penalty added to the gradient. With `decoupled_decay`, the share of the
        parameter that is subtracted per step, times the learning rate.
      momentum: Decay of the velocity, in [0, 1]; a Python zero means no velocity.
      centered: Whether to divide by the standard deviation.
      decoupled_decay: Whether weights decay separately from the gradient.
      corrected_weight_decay: Whether decoupled decay is also scaled by `lr / max_lr`.
      lr_in_momentum: Whether the learning rate enters the momentum buffer, as in TensorFlow.
      caution: Whether to drop the entries of the update where buffer and gradient differ in sign.
        The others are divided by the share of entries that is left, and thus grow at most 1000
        times. No effect without momentum; the buffer itself is not changed.
      max_lr: The learning rate with which timm's optimizer was created. Defaults to `lr` if that is
        a number.
      mask: Which parameters decay.
      storage: How the statistics are kept in memory, as in `rmsprop`.

    Raises:
      ValueError: If `corrected_weight_decay` is used with a schedule but without `max_lr`.

    Source: timm 1.0.31, timm/optim/rmsprop_tf.py; caution: arXiv:2411.16085.
    """
    decoupled_decay = checked_flag('decoupled_decay', decoupled_decay)
    corrected_weight_decay = checked_flag('corrected_weight_decay', corrected_weight_decay)
    pace, velocity = scale_by_learning_rate(lr), momentum_step(momentum, storage)
    order = (pace, velocity) if checked_flag('lr_in_momentum', lr_in_momentum) else (velocity, pace)
    root = rms_step(alpha, eps, initial_scale=1.0, centered=centered, storage=storage)
    step = precise_chain(root, *order)
    if checked_flag('caution', caution) and velocity is not None:
        step = cautious(step)
    if not decoupled_decay:
        return precise_chain(coupled_decay(weight_decay, mask), step)
    peak = (lr if max_lr is None else max_lr) if corrected_weight_decay else None
    return precise_chain(step, _decoupled_decay(lr, weight_decay, peak, mask))


def _decoupled_decay(
    lr: ScalarOrSchedule, weight_decay: ScalarOrSchedule, peak: Any, mask: Any
) -> Step | None:
    """`p <- p - lr weight_decay p`, times `lr / peak` where a peak is given."""
    if is_none_or_zero(weight_decay):
        return None
    if callable(peak):
        raise ValueError('corrected_weight_decay with a schedule needs max_lr, its peak.')
    if peak is None:
        return subtract_decayed_weights(lr, weight_decay, mask)
    top = constant('max_lr', peak)
    if is_none_or_zero(top):
        raise ValueError('max_lr must not be zero.')
    rate = Hyperparameter('lr', lr, lower=-math.inf)
    decay = Hyperparameter('weight_decay', weight_decay)

    def corrected(count: ArrayLike) -> Any:
        now = (jnp.asarray(x, float) for x in (rate.at(count), decay.at(count), top))
        pace, strength, peak = now
        return strength * (pace / peak)

    return subtract_decayed_weights(lr, corrected, mask)
