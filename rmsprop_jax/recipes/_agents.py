"""Recipes from reinforcement learning."""

import math
from typing import Any

import optax

from rmsprop_jax import dialects
from rmsprop_jax._checks import checked_steps
from rmsprop_jax._core.chains import precise_chain
from rmsprop_jax._core.edge import public
from rmsprop_jax._optimizer import rmsprop
from rmsprop_jax._transforms import clip_global_norm
from rmsprop_jax._types import Optimizer, ScalarOrSchedule
from rmsprop_jax.recipes import _records
from rmsprop_jax.recipes._records import Recipe
from rmsprop_jax.recipes._schedules import checked_rate, linear_to_zero, or_else


@public
def dqn_nature(
    *, learning_rate: ScalarOrSchedule = _records.DQN_NATURE.learning_rate, mean_over: int = 1
) -> Optimizer:
    """DQN of 2015, as its Lua code runs it: centered, no velocity, epsilon for a summed loss.

    ::

        m <- 0.95 m + 0.05 g;  n <- 0.95 n + 0.05 g^2         from 0
        p <- p - 2.5e-4 g / sqrt(n - m^2 + 0.01)

    The loss is a sum over 32 transitions. Each contributes half the square of its TD error, or a
    linear term beyond 1, so that the gradient has TD errors clipped to [-1, 1]. The paper's table
    calls 0.95 a 'gradient momentum', but it is the decay of `m`. The learning rate is constant and
    weights do not decay: `run_gpu` sets no option for either.

    Args:
      learning_rate: Step size, a number or a schedule; the published one by default.
      mean_over: The number of terms that your loss averages and the source sums: 32 for a mean over
        the batch, which makes epsilon 0.01 / 32^2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> errors = lambda p: optax.losses.huber_loss(p * jnp.arange(32.0), 1.0)
      >>> p = jnp.array(0.25)
      >>> steps = []
      >>> for reduction, mean_over in ((jnp.sum, 1), (jnp.mean, 32)):
      ...     tx = recipes.dqn_nature(mean_over=mean_over)
      ...     g = jax.grad(lambda p: reduction(errors(p)))(p)
      ...     steps.append(tx.update(g, tx.init(p))[0])
      >>> bool(jnp.allclose(*steps, rtol=1e-5))
      True

    Source: kuz/DeepMind-Atari-Deep-Q-Learner 54978fa, dqn/NeuralQLearner.lua: `qLearnMinibatch`
    (update), `getQUpdate` (clipping), `__init` (defaults); run_gpu (`lr`, `minibatch_size`).
    """
    r, terms = _records.DQN_NATURE, checked_steps('mean_over', mean_over, least=1)
    return rmsprop(checked_rate(learning_rate), r.decay, r.eps / terms**2, centered=r.centered)


@public
def dopamine_dqn(
    *, learning_rate: ScalarOrSchedule = _records.DOPAMINE_DQN.learning_rate
) -> Optimizer:
    """Dopamine's DQN with the settings of 2015: `dialects.tensorflow`, epsilon for a mean loss.

    Learning rate 2.5e-4, decay 0.95, epsilon 1e-5 inside the root, centered. The loss is the mean
    of a Huber loss over 32 transitions; 1e-5 is close to the 0.01 / 32^2 of `dqn_nature`. The
    second moment starts at one; in the code of 2015 it starts at zero.

    Args:
      learning_rate: Step size, a number or a schedule; the published one by default.

    Source: google/dopamine a804d3c, dopamine/tf/agents/dqn/configs/dqn_nature.gin, lines 17-23, and
    a13d583, dopamine/tf/agents/dqn/dqn_agent.py, `_build_train_op`.
    """
    r = _records.DOPAMINE_DQN
    rate = checked_rate(learning_rate)
    return dialects.tensorflow(rate, r.decay, r.momentum, r.eps, centered=r.centered)


@public
def a3c(
    *,
    total_frames: float,
    frames_per_update: float,
    max_norm: float | None,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """A3C, second-hand: RMSProp with a learning rate that falls from 7e-4 to zero.

    ::

        g  <- g min(1, max_norm / norm)
        nu <- 0.99 nu + 0.01 g^2
        p  <- p - learning_rate g / sqrt(nu + 0.1)

    All threads updated one shared `nu`. The accounts do not say where `nu` starts (here at zero).
    Nor do they say how the loss is reduced, on which epsilon depends.

    Args:
      total_frames: The number of frames, over all threads, at which the learning rate is zero.
      frames_per_update: The number of frames between two updates.
      max_norm: The maximum norm of all gradients together; None for no clipping. One account of the
        authors' e-mails says 40, the other does not mention clipping.
      learning_rate: Replaces the whole published schedule: a number, or a schedule of the 0-based
        update count. None keeps the published schedule.

    Source: the wiki of muupan/async-rl (values, schedule); miyosuda/async_deep_reinforce#1 (the
    same values, and clipping).
    """
    r = _records.A3C
    rate = _falling(r, total_frames, frames_per_update, learning_rate)
    step = rmsprop(rate, r.decay, r.eps)
    return step if max_norm is None else precise_chain(clip_global_norm('max_norm', max_norm), step)


@public
def baselines_a2c(
    *, total_timesteps: float, batch_size: float, learning_rate: ScalarOrSchedule | None = None
) -> Optimizer:
    """A2C of OpenAI Baselines: clipped gradients, `dialects.tensorflow`, a falling learning rate.

    The norm of all gradients is at most 0.5, decay is 0.99, and epsilon is 1e-5 inside the root.
    The learning rate falls from 7e-4 to zero. An update uses the rate at the last step of its
    batch: the source asks its scheduler once per step and keeps the last answer. The loss is a mean
    over the batch.

    Args:
      total_timesteps: Environment steps of the whole training; the source's default is 80e6.
      batch_size: Environment steps per update; the source's default is 5 for each environment.
      learning_rate: Replaces the whole published schedule: a number, or a schedule of the 0-based
        update count. None keeps the published schedule.

    Source: openai/baselines 015dc21, baselines/a2c/a2c.py, `Model.__init__` and `train` in it; and
    45c0b17, baselines/a2c/utils.py, `Scheduler` and `linear`.
    """
    r = _records.BASELINES_A2C
    total, share = ('total_timesteps', total_timesteps), ('batch_size', batch_size)
    rate = linear_to_zero(r.learning_rate, total, share, last_of_share=True)
    step = dialects.tensorflow(or_else(learning_rate, rate), r.decay, r.momentum, r.eps)
    return precise_chain(clip_global_norm('max_norm', r.max_norm), step)


@public
def sb3_a2c(*, learning_rate: ScalarOrSchedule = _records.SB3_A2C.learning_rate) -> Optimizer:
    """A2C of Stable-Baselines3: `torch.nn.utils.clip_grad_norm_` and `torch.optim.RMSprop`.

    The norm is at most 0.5, the learning rate is 7e-4 throughout, decay is 0.99, and epsilon is
    1e-5 outside the root. The loss is a mean over the batch.

    Args:
      learning_rate: Step size, a number or a schedule; the published one by default.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> tx = recipes.sb3_a2c()
      >>> update, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))  # clipped: 0.3, 0.4
      >>> [round(float(u), 6) for u in update]  # -7e-4 / 0.1
      [-0.006998, -0.006998]

    Source: DLR-RM/stable-baselines3 0574e58, stable_baselines3/a2c/a2c.py, `A2C.__init__` and
    `A2C.train`.
    """
    r = _records.SB3_A2C
    step = dialects.torch(checked_rate(learning_rate), r.decay, r.eps)
    return precise_chain(dialects.torch_clip_grad_norm(r.max_norm), step)


@public
def sb3_a2c_tf_like(
    *, learning_rate: ScalarOrSchedule = _records.SB3_A2C_TF_LIKE.learning_rate
) -> Optimizer:
    """`sb3_a2c` with `RMSpropTFLike`: epsilon 1e-5 is inside the root, and the start value is one.

    The manual of Stable-Baselines3 recommends this for matching its TensorFlow predecessor.

    Args:
      learning_rate: Step size, a number or a schedule; the published one by default.

    Source: DLR-RM/stable-baselines3 46449ad, docs/modules/a2c.md, the first warning; decay is the
    optimizer's default.
    """
    r = _records.SB3_A2C_TF_LIKE
    step = dialects.stable_baselines3(checked_rate(learning_rate), r.decay, r.eps)
    return precise_chain(dialects.torch_clip_grad_norm(r.max_norm), step)


@public
def impala_dmlab(
    *,
    total_frames: float,
    frames_per_update: float,
    mean_over: int = 1,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """IMPALA on a level of DeepMind Lab: `dialects.tensorflow`, a falling rate, no clipping.

    The learning rate falls from 4.8e-4 to zero as frames are used up. Decay is 0.99, and epsilon is
    0.1 inside the root. The loss is a sum over 32 unrolls of 100 steps.

    Args:
      total_frames: Frames of the whole training; the source's default is 1e9.
      frames_per_update: Unrolls in a batch, times steps, times action repeats: 12800 in the source.
      mean_over: The number of terms that your loss averages and the source sums: 3200 for a mean
        over all steps of all unrolls. Epsilon and the start value are divided by its square.
      learning_rate: Replaces the whole published schedule: a number, or a schedule of the 0-based
        update count. None keeps the published schedule.

    Source: google-deepmind/scalable_agent 103308a, experiment.py, optimizer flags, `build_learner`,
    `compute_policy_gradient_loss`; 1e70452, README.md (batch of 32).
    """
    return _impala(_records.IMPALA_DMLAB, total_frames, frames_per_update, mean_over, learning_rate)


@public
def impala_dmlab30(
    *,
    total_frames: float,
    frames_per_update: float,
    mean_over: int = 1,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """`impala_dmlab` with the learning rate for all of DMLab-30, which starts at 3.19e-4.

    The arguments are the same as for `impala_dmlab`; the source trains for 1e10 frames.

    Source: google-deepmind/scalable_agent 1e70452, README.md, 'Distributed Training on DMLab-30'.
    """
    return _impala(
        _records.IMPALA_DMLAB30, total_frames, frames_per_update, mean_over, learning_rate
    )


@public
def impala_atari(
    *,
    total_frames: float,
    frames_per_update: float,
    mean_over: int = 1,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """IMPALA on Atari, second-hand: learning rate from 6e-4, epsilon 0.01, norm at most 40.

    The account gives these values and decay 0.99. The dialect, the linear schedule and the summed
    loss come from `impala_dmlab`, the same authors' code. Torchbeast differs from the first update
    on: its second moment starts at zero, and its epsilon is outside the root. See
    `impala_torchbeast`.

    The arguments are the same as for `impala_dmlab`; `mean_over` also divides the norm.

    Source: google-deepmind/optax#532.
    """
    return _impala(_records.IMPALA_ATARI, total_frames, frames_per_update, mean_over, learning_rate)


@public
def impala_torchbeast(
    *,
    total_steps: float,
    steps_per_update: float,
    mean_over: int = 1,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """IMPALA of torchbeast: `clip_grad_norm_`, `torch.optim.RMSprop` and a falling learning rate.

    ::

        g  <- g min(1, 40 / (norm + 1e-6))
        nu <- 0.99 nu + 0.01 g^2                                    from 0
        p  <- p - learning_rate g / (sqrt(nu) + 0.01)

    The learning rate falls from 4.8e-4, the default of both its learners, to zero: update n uses
    `1 - n steps_per_update / total_steps` times 4.8e-4. The loss is a sum over unrolls and their
    steps.

    Args:
      total_steps: Environment steps of the whole training, `--total_steps`.
      steps_per_update: `--unroll_length` times `--batch_size`: 640 by default.
      mean_over: The number of terms that your loss averages and the source sums: 640 for a mean
        over all steps of all unrolls, with the source's defaults. Gradients are multiplied by it.
      learning_rate: Replaces the whole published schedule: a number, or a schedule of the 0-based
        update count. None keeps the published schedule.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> tx = recipes.impala_torchbeast(total_steps=30e6, steps_per_update=640)
      >>> update, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> [round(float(u), 6) for u in update]  # -4.8e-4 g / (0.1 g + 0.01)
      [-0.004645, -0.004683]

    Source: facebookresearch/torchbeast 0af07b0, torchbeast/monobeast.py and polybeast_learner.py:
    optimizer flags, `learn`, `train`, `lr_lambda` in it, `compute_policy_gradient_loss`.
    """
    r, terms = _records.IMPALA_TORCHBEAST, checked_steps('mean_over', mean_over, least=1)
    total, share = ('total_steps', total_steps), ('steps_per_update', steps_per_update)
    rate = linear_to_zero(r.learning_rate, total, share)
    return precise_chain(
        None if terms == 1 else optax.scale(float(terms)),
        dialects.torch_clip_grad_norm(r.max_norm),
        dialects.torch(or_else(learning_rate, rate), r.decay, r.eps),
    )


def _impala(
    r: Recipe, total_frames: float, frames_per_update: float, mean_over: int, learning_rate: Any
) -> Optimizer:
    terms = checked_steps('mean_over', mean_over, least=1)
    rate = _falling(r, total_frames, frames_per_update, learning_rate)
    # As dialects.tensorflow, except that the start value scales with epsilon, whose unit it has.
    step = rmsprop(
        rate, r.decay, r.eps / terms**2, initial_scale=1.0 / terms**2, momentum=r.momentum
    )
    if math.isinf(r.max_norm):
        return step
    return precise_chain(clip_global_norm('max_norm', r.max_norm / terms), step)


def _falling(r: Recipe, total_frames: Any, frames_per_update: Any, learning_rate: Any) -> Any:
    total, share = ('total_frames', total_frames), ('frames_per_update', frames_per_update)
    return or_else(learning_rate, linear_to_zero(r.learning_rate, total, share))
