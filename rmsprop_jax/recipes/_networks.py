"""Recipes for image classifiers, a text generator and a generative adversarial network."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_map_with_path

from rmsprop_jax import dialects
from rmsprop_jax._core.chains import chain, in_accumulator_precision, precise_chain
from rmsprop_jax._core.edge import public
from rmsprop_jax._core.leaves import Statistic
from rmsprop_jax._optimizer import add_decayed_weights
from rmsprop_jax._transforms import clip_parameters
from rmsprop_jax._types import KeyPath, Optimizer, ScalarOrSchedule
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


@public
def graves(*, learning_rate: ScalarOrSchedule = _records.GRAVES.learning_rate) -> Optimizer:
    """Graves 2013, second-hand: `dialects.graves` with the constants of its equations 38 to 45.

    Learning rate 1e-4, decay 0.95, momentum 0.9, epsilon 1e-4 inside the root, centered. Two things
    are not verified: the reduction of the loss, and the bounds to which the paper clips
    derivatives. That clipping is inside the network and not part of this recipe.

    Args:
      learning_rate: Step size, a number or a schedule; the published one by default.

    Source: chainer/chainer 0c89f4d, chainer/optimizers/rmsprop_graves.py, which says that its
    defaults are the paper's, arXiv:1308.0850.
    """
    r = _records.GRAVES
    return dialects.graves(checked_rate(learning_rate), r.decay, r.momentum, r.eps)


@public
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

    Decay and momentum are 0.9. The loss is a mean over the batch, of 1024 by default. The source
    can warm up, but does not by default. It evaluates an average of the weights: `ema_update` with
    decay 0.995 and a count.

    Args:
      steps_per_epoch: Updates per epoch, possibly a fraction: 1281167 / 1024 in the source.
      batch_size: Examples per update.
      mask: Which parameters decay; see `describe_mask`.
      learning_rate: Replaces the whole published schedule: a number, or a schedule of the 0-based
        update count. None keeps the published schedule.

    Source: tensorflow/tpu 4a4a9e0, models/experimental/inception/inception_v3.py, flags, constants
    and `inception_model_fn`; for L2 tensorflow/tensorflow 1ea933c,
    tensorflow/contrib/slim/python/slim/nets/inception_v3.py, `inception_v3_arg_scope`.
    """
    return _tensorflow(_records.INCEPTION_V3, steps_per_epoch, batch_size, mask, learning_rate)


@public
def mnasnet(
    *,
    steps_per_epoch: float,
    batch_size: float,
    mask: Any = tensorflow_decay_mask,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """MnasNet as the code for TPUs trains it: the recipe of `efficientnet` with batches of 1024.

    The arguments are the same as for `efficientnet`.

    Source: tensorflow/tpu c08e52a, models/official/mnasnet/mnasnet_main.py, `mnasnet_model_fn`;
    5ef64b7, mnasnet_utils.py; 1aff05d, configs/mnasnet_config.py.
    """
    return _tensorflow(_records.MNASNET, steps_per_epoch, batch_size, mask, learning_rate)


@public
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

    Decay and momentum are 0.9. The first update has learning rate zero. Two drops, at 2.4 and 4.8
    epochs, fall into the warm-up: it ends just below `r`, and the next rate is `0.97^2 r`. The loss
    is a mean over the batch, of 2048 by default. The source evaluates an average of the parameters
    and batch statistics: `ema_update` with decay 0.9999 and a count.

    Args:
      steps_per_epoch: Updates per epoch, possibly a fraction: 1281167 / 2048 in the source.
      batch_size: Examples per update.
      mask: Which parameters decay; see `describe_mask`.
      learning_rate: Replaces the whole published schedule: a number, or a schedule of the 0-based
        update count. None keeps the published schedule.

    Source: tensorflow/tpu 01b6706, models/official/efficientnet/main.py, flags and `model_fn`;
    139e1f4, utils.py, `build_learning_rate`, `build_optimizer`, `get_ema_vars`.
    """
    return _tensorflow(_records.EFFICIENTNET, steps_per_epoch, batch_size, mask, learning_rate)


@public
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

    Decay and momentum are 0.9. The loss is a mean over the whole batch, with 96 examples on each
    GPU. The README's `0.045 NUM_GPUS` and `2.5 / NUM_GPUS` epochs are the same numbers, for epochs
    counted on one GPU. The source evaluates an average of the weights: `ema_update` with decay
    0.9999 and a count.

    Args:
      steps_per_epoch: Updates with the whole batch per epoch, possibly a fraction.
      batch_size: Examples per update: 96 times the number of GPUs.
      mask: Which parameters decay; see `describe_mask`.
      learning_rate: Replaces the whole published schedule: a number, or a schedule of the 0-based
        update count. None keeps the published schedule.

    Source: tensorflow/models 0ba83cf, research/slim/nets/mobilenet/README.md; 64f40ce,
    research/slim/train_image_classifier.py, flags, `_configure_learning_rate`,
    `_configure_optimizer`; 02c04f4, research/slim/nets/mobilenet/mobilenet.py, `training_scope`.
    """
    return _tensorflow(_records.MOBILENET_V2, steps_per_epoch, batch_size, mask, learning_rate)


@public
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

    The epoch is a whole number, so the rate is constant within it. Momentum and alpha are 0.9. The
    commands for B2 (batch 2 x 128, r 0.016), B0 (2 x 384, 0.048) and ES (8 x 128, 0.064) agree on
    `r` per example. The loss is a mean over the batch. B0 and B2 evaluate an average of the
    weights: `ema_update` with decay 0.9999 and count None, since the script at these commits uses
    `ModelEmaV2`. Newer scripts use `ModelEmaV3`; see `ema_update`.

    Args:
      steps_per_epoch: Updates per epoch, an integer.
      warmup_epochs: Epochs of warm-up. The commands use the script's default, which was 3 and
        later 5.
      batch_size: Examples per update.
      mask: Which parameters decay; see `describe_mask`.
      learning_rate: Replaces the whole published schedule: a number, or a schedule of the 0-based
        update count. None keeps the published schedule.

    Source: huggingface/pytorch-image-models 3034f27, hfdocs/source/training_script.mdx; 59b3d86,
    timm/scheduler/step_lr.py; 0001522, timm/optim/_param_groups.py, `param_groups_weight_decay`;
    train.py 004fb5f and 2aabaef (momentum, warm-up, no warm-up prefix).
    """
    r = _records.EFFICIENTNET_TIMM
    return _timm(r, scaled_rate(r, batch_size), steps_per_epoch, warmup_epochs, mask, learning_rate)


@public
def mobilenet_v3_timm(
    *,
    steps_per_epoch: int,
    warmup_epochs: int,
    mask: Any = timm_decay_mask,
    learning_rate: ScalarOrSchedule | None = None,
) -> Optimizer:
    """MobileNetV3-Large as timm trains it: `efficientnet_timm` with rate 0.064 and factor 0.973.

    This rate is for the source's batch of 2 x 512. From 42% to 90% of its 600 epochs, the source
    also multiplies the rate by random noise; this recipe does not. Evaluate an average of the
    weights: `ema_update` with decay 0.9999 and count None.

    The arguments are the same as for `efficientnet_timm`.

    Source: huggingface/pytorch-image-models 3034f27, hfdocs/source/training_script.mdx,
    'MobileNetV3-Large-100'; the rest as `efficientnet_timm`.
    """
    r = _records.MOBILENET_V3_TIMM
    return _timm(r, r.learning_rate, steps_per_epoch, warmup_epochs, mask, learning_rate)


@public
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

    The source clamps before each step of the critic. This recipe clamps after it, which an Optax
    chain can do. If you start from `wgan_clamp(params)`, the critic's steps are the same. Two
    differences remain. In the source, the steps of the generator see a critic that is up to one
    step outside the bounds, and the final critic is not clamped. Here the critic is always within
    the bounds.

    The loss is a mean over the batch of 64. The critic takes 5 steps for each step of the
    generator, but 100 for each of the generator's first 25 steps and for every 500th. The critic's
    optimizer must be the last transformation of a chain, and its `update` needs `params`.

    Args:
      network: The network that the optimizer is for.
      learning_rate: Step size, a number or a schedule; the published one by default.

    Raises:
      ValueError: If `network` is another name.

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
    clipped = chain(step, clip_parameters('clamp', r.clamp))
    # In float32, since `clip_parameters` rounds updates to the parameters' dtype.
    return in_accumulator_precision(clipped, with_params=True)


def wgan_clamp(params: Any) -> Any:
    """Clamps the critic's parameters to [-0.01, 0.01]. Call it before the first step."""
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
    """`step`, preceded by the gradient of the recipe's L2 penalty."""
    return precise_chain(add_decayed_weights(r.weight_decay, mask), step)
