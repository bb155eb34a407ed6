"""MXNet 2 and MXNet 1, which differ in two lines."""

from typing import Any

from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_flag
from rmsprop_jax._core.chains import chain
from rmsprop_jax._optimizer import precise_chain, rmsprop
from rmsprop_jax._transforms import clip_parameters, rescale
from rmsprop_jax._types import ScalarOrSchedule, is_none_or_zero
from rmsprop_jax.dialects._record import Dialect, Epsilon, Rule
from rmsprop_jax.dialects._shared import XLA, Optimizer, Step, clipping_unless_zero, coupled_decay
from rmsprop_jax.storage._choice import Storage

_REFUSED = {
    'use_fused_step': XLA,
    'multi_precision': 'accumulators are float32 for narrow parameters: leave it out',
    'lr_scheduler': 'pass the schedule as learning_rate, shifted by one: MXNet counts from 1',
    'param_idx2name': 'trees have names: leave it out',
    'param_dict': 'use optax.partition for per-parameter rates',
    'begin_num_update': 'shift the schedule instead',
    'aggregate_num': XLA,
    'sym': 'it reads per-parameter rates from a graph: use optax.partition',
}
_GRAVES = Rule(centered=('yes',), weight_decay=('coupled',), when='centered')


def _plain(epsilon: Epsilon) -> Rule:
    return Rule((epsilon,), centered=('no',), momentum=('none',), weight_decay=('coupled',))


@Dialect(
    title='MXNet 2',
    rules=(_plain('outside the root'), _GRAVES),
    refused={**_REFUSED, 'gamma1': 'use rho', 'gamma2': 'use momentum'},
)
def mxnet(
    learning_rate: ScalarOrSchedule = 1e-3,
    rho: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.9,
    epsilon: ScalarOrSchedule = 1e-8,
    centered: bool = False,
    clip_weights: ArrayLike | None = None,
    *,
    wd: ScalarOrSchedule = 0.0,
    rescale_grad: ArrayLike = 1.0,
    clip_gradient: ArrayLike | None = None,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """`mxnet.optimizer.RMSProp` of MXNet 2: epsilon outside the root, or inside when centered.

    ::

        g <- clip(rescale_grad g, clip_gradient) + wd p
        nu <- rho nu + (1 - rho) g^2                                  from 0
        p <- p - learning_rate g / (sqrt(nu) + epsilon)               momentum is not used
        b <- momentum b - learning_rate g / sqrt(var + epsilon);  p <- p + b        centered
        p <- clip(p, clip_weights)

    Args:
      learning_rate: Step size, in the unit of the parameter.
      rho: Weight of the past in the running averages, in [0, 1].
      momentum: Decay of the velocity, in [0, 1]; used only when centered, as in MXNet.
      epsilon: In the unit of the gradient; when centered, in its squared unit.
      centered: Whether to divide by the standard deviation.
      clip_weights: Maximum magnitude of a parameter after the step. With it, `update` needs
        `params`, and this must be the last transformation of a chain. For `clip_weights` and
        `clip_gradient`, a Python zero means no clipping, as in MXNet.
      wd: L2 penalty, added to the clipped gradient.
      rescale_grad: Factor by which the gradients are multiplied.
      clip_gradient: Maximum magnitude of a gradient's entry.
      mask: Which parameters decay.
      storage: How the statistics are kept in memory, as in `rmsprop`.

    Source: MXNet 2.0.0b1, python/mxnet/optimizer/rmsprop.py and src/operator/optimizer_op-inl.h.
    """
    return _mxnet(
        learning_rate,
        rho,
        momentum,
        epsilon,
        checked_flag('centered', centered),
        clip_weights,
        eps_in_sqrt=bool(centered),
        prepare=(
            rescale('rescale_grad', rescale_grad),
            clipping_unless_zero(clip_gradient=clip_gradient),
            coupled_decay(wd, mask, 'wd'),
        ),
        storage=storage,
    )


@Dialect(title='MXNet 1', rules=(_plain('inside the root'), _GRAVES), refused=_REFUSED)
def mxnet1(
    learning_rate: ScalarOrSchedule = 1e-3,
    gamma1: ScalarOrSchedule = 0.9,
    gamma2: ScalarOrSchedule = 0.9,
    epsilon: ScalarOrSchedule = 1e-8,
    centered: bool = False,
    clip_weights: ArrayLike | None = None,
    *,
    wd: ScalarOrSchedule = 0.0,
    rescale_grad: ArrayLike = 1.0,
    clip_gradient: ArrayLike | None = None,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """`mxnet.optimizer.RMSProp` of MXNet 1: `mxnet` with two lines changed.

    ::

        g <- clip(rescale_grad g + wd p, clip_gradient)
        p <- p - learning_rate g / sqrt(nu + epsilon)                 epsilon inside, always

    The arguments are the same as for `mxnet`; here `rho` is called `gamma1`, and `momentum` is
    called `gamma2`.

    Source: MXNet 1.9.1, python/mxnet/optimizer/optimizer.py and src/operator/optimizer_op-inl.h.
    """
    return _mxnet(
        learning_rate,
        gamma1,
        gamma2,
        epsilon,
        centered,
        clip_weights,
        eps_in_sqrt=True,
        prepare=(
            rescale('rescale_grad', rescale_grad),
            coupled_decay(wd, mask, 'wd'),
            clipping_unless_zero(clip_gradient=clip_gradient),
        ),
        storage=storage,
    )


def _mxnet(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule,
    momentum: ScalarOrSchedule,
    epsilon: ScalarOrSchedule,
    centered: bool,
    clip_weights: ArrayLike | None,
    *,
    eps_in_sqrt: bool,
    prepare: tuple[Step | None, ...],
    storage: Storage | None,
) -> Optimizer:
    """Both versions, given the place of epsilon and the steps that prepare the gradient."""
    step = rmsprop(
        learning_rate,
        decay,
        epsilon,
        eps_in_sqrt=eps_in_sqrt,
        centered=centered,
        momentum=momentum if centered else None,
        storage=storage,
    )
    chained = precise_chain(*prepare, step)
    if clip_weights is None or is_none_or_zero(clip_weights):
        return chained
    return chain(chained, clip_parameters('clip_weights', clip_weights))
