"""Recipes for image classifiers, a text generator and a generative adversarial network."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_map_with_path

from rmsprop_jax import dialects
from rmsprop_jax._core.leaves import Statistic
from rmsprop_jax._optimizer import add_decayed_weights, precise_chain
from rmsprop_jax._transforms import clip_parameters
from rmsprop_jax._types import KeyPath, ScalarOrSchedule
from rmsprop_jax.recipes import _records
from rmsprop_jax.recipes._masks import slim_decay_mask, tensorflow_decay_mask, timm_decay_mask
from rmsprop_jax.recipes._records import Recipe
from rmsprop_jax.recipes._schedules import (
    checked_rate,
    or_else,
    scaled_rate,
    staircase,
    staircase_by_epoch,
    staircase_of,
)

Optimizer = optax.GradientTransformationExtraArgs


def graves(*, learning_rate: ScalarOrSchedule = _records.GRAVES.learning_rate) -> Optimizer:
    """Graves 2013, second-hand: `dialects.graves` with the constants of its equations 38 to 45.

    Learning rate 1e-4, decay 0.95, momentum 0.9, epsilon 1e-4 inside the root, centered. How the
    loss is reduced, and within which bounds derivatives are clipped, is not verified: that clipping
    is inside the network and not part of this.

    Args:
      learning_rate: Step size: the published one, or a number or schedule in its place.

    Source: chainer/chainer 0c89f4d, chainer/optimizers/rmsprop_graves.py, whose defaults are said
    to be the paper's, arXiv:1308.0850.
    """
    r = _records.GRAVES
    return dialects.graves(checked_rate(learning_rate), r.decay, r.momentum, r.eps)


def inception_v3(
    *,
    steps_per_epoch: float,
    batch_size: float,
    mask: Any = slim_decay_mask,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """Inception-v3 as the code for TPUs trains it: `dialects.tensorflow` with epsilon 1.

    ::

        g             <- g + 4e-5 p                    convolutions' and dense layers' weights
        learning_rate  = r max(0.94^floor(step / int(3 steps_per_epoch)), 1e-4)
        r              = 0.165 batch_size / 256

    Decay and momentum are 0.9. The loss is a mean over the batch, 1024 by default. The source can
    warm up but does not by default. For evaluation it averages with `ema_update`, decay 0.995,
    count given.

    Args:
      steps_per_epoch: Updates per epoch, not necessarily whole: 1281167 / 1024 in the source.
      batch_size: Examples in an update.
      mask: What decays; see `describe_mask`.
      learning_rate: A number or a schedule of the 0-based update count, in the place of the whole
        published schedule; None keeps that.

    Source: tensorflow/tpu 4a4a9e0, models/experimental/inception/inception_v3.py, flags, constants
    and `inception_model_fn`; for L2 tensorflow/tensorflow 1ea933c,
    tensorflow/contrib/slim/python/slim/nets/inception_v3.py, `inception_v3_arg_scope`.
    """
    return _tensorflow(_records.INCEPTION_V3, steps_per_epoch, batch_size, mask, learning_rate)


def mnasnet(
    *,
    steps_per_epoch: float,
    batch_size: float,
    mask: Any = tensorflow_decay_mask,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """MnasNet as the code for TPUs trains it: what `efficientnet` does, at batch 1024.

    Arguments are those of `efficientnet`.

    Source: tensorflow/tpu c08e52a, models/official/mnasnet/mnasnet_main.py, `mnasnet_model_fn`;
    5ef64b7, mnasnet_utils.py; 1aff05d, configs/mnasnet_config.py.
    """
    return _tensorflow(_records.MNASNET, steps_per_epoch, batch_size, mask, learning_rate)


def efficientnet(
    *,
    steps_per_epoch: float,
    batch_size: float,
    mask: Any = tensorflow_decay_mask,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """EfficientNet as the code for TPUs trains it: `dialects.tensorflow` with epsilon 1e-3.

    ::

        g             <- g + 1e-5 p                    all but batch normalisation
        learning_rate  = r step / w                    while step < w = int(5 steps_per_epoch)
        learning_rate  = r 0.97^floor(step / (2.4 steps_per_epoch))         from then on
        r              = 0.016 batch_size / 256

    Decay and momentum are 0.9. The first update has learning rate zero; two drops, at 2.4 and 4.8
    epochs, fall into the warm-up, so that the highest rate is near `r` and the one after the
    warm-up `0.97^2 r`. The loss is a mean over the batch, 2048 by default. For evaluation it
    averages parameters and batch statistics with `ema_update`, decay 0.9999, count given.

    Args:
      steps_per_epoch: Updates per epoch, not necessarily whole: 1281167 / 2048 in the source.
      batch_size: Examples in an update.
      mask: What decays; see `describe_mask`.
      learning_rate: A number or a schedule of the 0-based update count, in the place of the whole
        published schedule; None keeps that.

    Source: tensorflow/tpu 01b6706, models/official/efficientnet/main.py, flags and `model_fn`;
    139e1f4, utils.py, `build_learning_rate`, `build_optimizer`, `get_ema_vars`.
    """
    return _tensorflow(_records.EFFICIENTNET, steps_per_epoch, batch_size, mask, learning_rate)


def mobilenet_v2(
    *,
    steps_per_epoch: float,
    batch_size: float,
    mask: Any = slim_decay_mask,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """MobileNetV2 as TF-Slim's README advises: `dialects.tensorflow` with epsilon 1.

    ::

        g             <- g + 4e-5 p      weights of layers that are not depthwise
        learning_rate  = 0.045 (batch_size / 96) 0.98^floor(step / int(2.5 steps_per_epoch))

    Decay and momentum are 0.9. The loss is a mean over the whole batch, of 96 on each GPU: the
    README's `0.045 NUM_GPUS` and `2.5 / NUM_GPUS` epochs, which count those of one GPU, are the
    same in terms of that batch. For evaluation it averages with `ema_update`, decay 0.9999, count
    given.

    Args:
      steps_per_epoch: Updates per epoch of the whole batch, not necessarily whole.
      batch_size: Examples in an update: 96 times the number of GPUs.
      mask: What decays; see `describe_mask`.
      learning_rate: A number or a schedule of the 0-based update count, in the place of the whole
        published schedule; None keeps that.

    Source: tensorflow/models 0ba83cf, research/slim/nets/mobilenet/README.md; 64f40ce,
    research/slim/train_image_classifier.py, flags, `_configure_learning_rate`,
    `_configure_optimizer`; 02c04f4, research/slim/nets/mobilenet/mobilenet.py, `training_scope`.
    """
    return _tensorflow(_records.MOBILENET_V2, steps_per_epoch, batch_size, mask, learning_rate)


def efficientnet_timm(
    *,
    steps_per_epoch: int,
    warmup_epochs: int,
    batch_size: float,
    mask: Any = timm_decay_mask,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """EfficientNet-B0, B2 and ES as timm trains them: `dialects.timm` with epsilon 1e-3.

    ::

        g             <- g + 1e-5 p                            arrays of two axes or more
        learning_rate  = 1e-6 + epoch (r - 1e-6) / warmup_epochs     while epoch < warmup_epochs
        learning_rate  = r 0.97^floor(epoch / 2.4)                   from then on
        r              = 0.016 batch_size / 256

    with the epoch a whole number, so that the rate is constant within it. Momentum is 0.9 and so is
    alpha. The commands for B2 (batch 2 x 128, r 0.016), B0 (2 x 384, 0.048) and ES (8 x 128, 0.064)
    agree on `r` per example. The loss is a mean over the batch. B0 and B2 are evaluated with
    `ema_update`, decay 0.9999, count None: the script at these commits averages with `ModelEmaV2`.
    Newer ones run `ModelEmaV3`, for which see `ema_update`.

    Args:
      steps_per_epoch: Updates per epoch, whole.
      warmup_epochs: The commands leave it to the script's default, which was 3 and later 5.
      batch_size: Examples in an update.
      mask: What decays; see `describe_mask`.
      learning_rate: A number or a schedule of the 0-based update count, in the place of the whole
        published schedule; None keeps that.

    Source: huggingface/pytorch-image-models 3034f27, hfdocs/source/training_script.mdx; 59b3d86,
    timm/scheduler/step_lr.py; 0001522, timm/optim/_param_groups.py, `param_groups_weight_decay`;
    train.py 004fb5f and 2aabaef (momentum, warm-up, no warm-up prefix).
    """
    r = _records.EFFICIENTNET_TIMM
    return _timm(r, scaled_rate(r, batch_size), steps_per_epoch, warmup_epochs, mask, learning_rate)


def mobilenet_v3_timm(
    *,
    steps_per_epoch: int,
    warmup_epochs: int,
    mask: Any = timm_decay_mask,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """MobileNetV3-Large as timm trains it: `efficientnet_timm` with rate 0.064 and factor 0.973.

    That is for its batch of 2 x 512. The source also multiplies the rate by random noise from 42%
    to 90% of its 600 epochs; this does not. Evaluate with `ema_update`, decay 0.9999, count None.

    Arguments are those of `efficientnet_timm`.

    Source: huggingface/pytorch-image-models 3034f27, hfdocs/source/training_script.mdx,
    'MobileNetV3-Large-100'; the rest as `efficientnet_timm`.
    """
    r = _records.MOBILENET_V3_TIMM
    return _timm(r, r.learning_rate, steps_per_epoch, warmup_epochs, mask, learning_rate)


def wgan(
    *,
    network: Literal['critic', 'generator'],
    learning_rate: ScalarOrSchedule = _records.WGAN.learning_rate,
) -> Optimizer:
    """Wasserstein GAN: `dialects.torch` with its defaults at rate 5e-5; the critic is clamped.

    ::

        nu <- 0.99 nu + 0.01 g^2                       from 0
        p  <- p - 5e-5 g / (sqrt(nu) + 1e-8)
        p  <- min(max(p, -0.01), 0.01)                 critic

    The source clamps before each step of the critic, this after it, which an Optax chain can do.
    Start from `wgan_clamp(params)` and the critic's steps are the same. Two things still differ:
    the source leaves the critic unclamped after its last step, and so a step of the generator,
    which comes between the critic's, sees it up to one step outside the bounds; here never.

    The loss is a mean over the batch of 64. The critic takes 5 steps for one of the generator, 100
    for each of the generator's first 25 and every 500th. With the clamp, this must be the last
    transformation of a chain, and `update` needs `params`.

    Args:
      network: Which of the two networks it is for.
      learning_rate: Step size: the published one, or a number or schedule in its place.

    Raises:
      ValueError: For another name.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import recipes
      >>> params = recipes.wgan_clamp(jnp.array([0.5, 0.002]))
      >>> tx = recipes.wgan(network='critic')
      >>> updates, _ = tx.update(jnp.array([-1.0, 1.0]), tx.init(params), params)
      >>> [round(float(p), 4) for p in optax.apply_updates(params, updates)]
      [0.01, 0.0015]

    Source: martinarjovsky/WassersteinGAN 2cf43ba, main.py, options and training loop.
    """
    r = _records.WGAN
    step = dialects.torch(checked_rate(learning_rate), r.decay, r.eps)
    if network == 'generator':
        return step
    if network != 'critic':
        raise ValueError(f"network must be 'critic' or 'generator', got {network!r}.")
    return precise_chain(step, clip_parameters('clamp', r.clamp))


def wgan_clamp(params: Any) -> Any:
    """The critic's parameters within 0.01 of zero, as before its first step."""
    limit = _records.WGAN.clamp
    kind = Statistic('params')

    def leaf(path: KeyPath, p: Any) -> jax.Array:
        kind.dtype(f'params{keystr(path)}', p)
        return jnp.clip(p, -limit, limit)

    return tree_map_with_path(leaf, params)


def _tensorflow(
    r: Recipe, steps_per_epoch: Any, batch_size: Any, mask: Any, learning_rate: Any
) -> Optimizer:
    published = staircase(scaled_rate(r, batch_size), staircase_of(r), steps_per_epoch)
    rate = or_else(learning_rate, published)
    return _decayed(r, dialects.tensorflow(rate, r.decay, r.momentum, r.eps), mask)


def _timm(
    r: Recipe,
    peak: float,
    steps_per_epoch: Any,
    warmup_epochs: Any,
    mask: Any,
    learning_rate: Any,
) -> Optimizer:
    published = staircase_by_epoch(peak, staircase_of(r), steps_per_epoch, warmup_epochs)
    rate = or_else(learning_rate, published)
    return _decayed(r, dialects.timm(rate, r.decay, r.eps, momentum=r.momentum), mask)


def _decayed(r: Recipe, step: optax.GradientTransformation, mask: Any) -> Optimizer:
    """`step` on gradients of a loss with its L2 term."""
    return precise_chain(add_decayed_weights(r.weight_decay, mask), step)
