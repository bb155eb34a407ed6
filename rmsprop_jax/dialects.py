"""RMSProp as each framework computes it: its argument names, order and defaults.

Every function here is a short chain of this package's transformations and Optax's. Frameworks that
compute one of these under another name are listed by `table()`, with the call that reproduces them.
What they return prints as the call that made it:

    >>> from rmsprop_jax import dialects
    >>> dialects.hinton(1e-3)
    rmsprop_jax.dialects.hinton(learning_rate=0.001, decay=0.9)

Three things apply to all. Where a framework subtracts `mu^2` from `nu` and turns NaN on gradients
that hardly change, we carry the variance itself and stay finite. Accumulators are float32 for
narrower parameters. And a Python zero for momentum or weight decay means, as in the frameworks,
that there is none and `update` needs no parameters for it; an array is always taken at its word.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_flag, checked_mask, checked_steps
from rmsprop_jax._core.chains import chain
from rmsprop_jax._core.edge import public
from rmsprop_jax._core.moments import magnitude, root_or_zero
from rmsprop_jax._equivalents import Equivalent as Equivalent
from rmsprop_jax._equivalents import table as table
from rmsprop_jax._momentum import trace_step
from rmsprop_jax._optimizer import (
    add_decayed_weights,
    in_accumulator_precision,
    precise_chain,
    rmsprop,
    scale_by_learning_rate,
    subtract_decayed_weights,
)
from rmsprop_jax._precondition import rms_step
from rmsprop_jax._transforms import (
    accumulate,
    average_parameters,
    cautious,
    clip_each_norm,
    clip_global_norm,
    clip_parameters,
    clip_value,
    norm_of,
    rescale,
    scaled,
    skip_zero_rows,
    unscale,
)
from rmsprop_jax._types import (
    Hyperparameter,
    ScalarOrSchedule,
    cast,
    constant,
    decay_rate,
    is_absent,
)
from rmsprop_jax.storage._choice import Storage

Optimizer = optax.GradientTransformationExtraArgs
Step = optax.GradientTransformation
P = ParamSpec('P')

_XLA = 'it chooses how the framework runs the update; under jax.jit, XLA does: leave it out'
_NAME = 'it names operations in a graph: leave it out'


# Numbers that frameworks call otherwise than `rmsprop` does.
_NUMBERS = {
    **dict.fromkeys(('alpha', 'rho', 'gamma1', 'gamma2'), decay_rate),
    # PyTorch and those who follow it refuse a negative rate.
    **dict.fromkeys(('lr', 'epsilon', 'wd'), Hyperparameter),
}


def _framework(**refused: str) -> Callable[[Callable[P, Optimizer]], Callable[P, Optimizer]]:
    """Checks numbers under the names that the framework gives them, and answers arguments that it
    has and we have not with what to do instead."""

    def decorate(function: Callable[P, Optimizer]) -> Callable[P, Optimizer]:
        positions = list(inspect.signature(function).parameters)

        def checked(name: str, value: Any) -> Any:
            if name not in _NUMBERS or value is None:
                return value
            number = _NUMBERS[name](name, value)
            return number.at if callable(value) else number.value

        @public
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> Optimizer:
            for name in kwargs.keys() & refused.keys():
                raise TypeError(f'{function.__name__} has no argument {name!r}: {refused[name]}.')
            # Too many are left to the function to refuse.
            head = map(checked, positions, args)
            named = {name: checked(name, value) for name, value in kwargs.items()}
            return function(*head, *args[len(positions) :], **named)  # pyright: ignore[reportCallIssue]

        return wrapped

    return decorate


@_framework(
    foreach=_XLA,
    capturable=_XLA,
    differentiable='every transformation here is differentiable: leave it out',
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

    Complex parameters are pairs of reals, each with its own second moment.

    Args:
      lr: Learning rate, in the unit of the parameter.
      alpha: Weight of the past in the running averages, in [0, 1].
      eps: Added to the root, in the unit of the gradient.
      weight_decay: L2 penalty, added to the gradient after `maximize` has flipped it.
      momentum: In [0, 1]; a Python zero means none.
      centered: Whether to divide by the standard deviation.
      maximize: Whether to climb.
      mask: What `weight_decay` applies to, as for `optax.add_decayed_weights`.
      storage: How the statistics are kept in memory, as for `rmsprop`.

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
        _coupled_decay(weight_decay, mask),
        rms_step(alpha, eps, eps_in_sqrt=False, centered=centered, storage=storage, of_pairs=True),
        _momentum(momentum, storage, of_pairs=True),
        scale_by_learning_rate(lr),
    )


@_framework(foreach=_XLA, error_if_nonfinite='chain optax.apply_if_finite around the optimizer')
def torch_clip_grad_norm(max_norm: ArrayLike, norm_type: float = 2.0) -> Optimizer:
    """`torch.nn.utils.clip_grad_norm_`: `g <- g min(1, max_norm / (norm + 1e-6))`.

    Optax's `clip_by_global_norm` divides by the norm alone, so that a PyTorch run with clipping is
    not reproduced exactly by it.

    Args:
      max_norm: The largest norm, in the unit of the gradient.
      norm_type: The order of the norm over all gradients, positive; `math.inf` takes the largest
        magnitude.

    Raises:
      ValueError: For an order that is not positive, which PyTorch accepts but which is no norm.

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
    """`x^order`, differentiable at zero for orders below one too."""
    vanishes = x == 0
    return jnp.where(vanishes, 0, jnp.where(vanishes, 1, x) ** order)


@_framework(
    name=_NAME,
    var_list='give mask, a tree of booleans',
    overwrite_with_gradient='set such variables outside the optimizer, with optax.partition',
)
def keras(
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
    ema_overwrite_frequency: int | None = None,
    *,
    loss_scale_factor: ArrayLike | None = None,
    gradient_accumulation_steps: int | None = None,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """`keras.optimizers.RMSprop` of Keras 3, in Keras's order of operations.

    ::

        g  <- g / loss_scale_factor
        g  <- mean of gradient_accumulation_steps gradients; between them p does not move
        g  <- clipped
        p  <- p - learning_rate weight_decay p
        nu <- rho nu + (1 - rho) g^2                                        from 0
        b  <- momentum b + learning_rate g / sqrt(nu + epsilon);  p <- p - b
        a  <- ema_momentum a + (1 - ema_momentum) p                         first: a <- p
        p  <- a                                       every ema_overwrite_frequency

    As in Keras, a schedule sees the number of calls, not of accumulated steps; the average moves at
    every call, also between accumulated steps, and copies `p` during the whole first window. The
    average is in the state: `optax.tree.get(state, 'ema')`. With `use_ema` this must be the last
    transformation of a chain, and needs `params`.

    Embeddings: on TensorFlow too, rows that were not looked up decay, and momentum moves them. But
    where ids repeat within a step, Keras on TensorFlow squares and clips the gradient of each
    lookup apart. (It adds them first with `gradient_accumulation_steps`, and after taking the norm
    with `global_clipnorm`.) A dense gradient holds their sum only: this cannot be reproduced here.

    Args:
      learning_rate: Step size, in the unit of the parameter.
      rho: Weight of the past in the running averages, in [0, 1].
      momentum: In [0, 1]; a Python zero means none.
      epsilon: Added inside the root, in the squared unit of the gradient.
      centered: Whether to divide by the standard deviation.
      weight_decay: Decoupled decay per step, times the learning rate.
      clipnorm: Largest norm of each gradient array. Here and in the next two a Python zero means
        none, as in Keras.
      clipvalue: Largest magnitude of each entry.
      global_clipnorm: Largest norm of all gradients together. At most one of the three is given.
      use_ema: Whether to average the parameters.
      ema_momentum: Weight of the past in that average.
      ema_overwrite_frequency: After how many steps the average replaces the parameters.
      loss_scale_factor: What gradients are divided by.
      gradient_accumulation_steps: How many calls make a step, at least 2.
      mask: What is decayed, in the place of Keras's `exclude_from_weight_decay`.
      storage: How the statistics are kept in memory, as for `rmsprop`.

    Raises:
      ValueError: For more than one kind of clipping, or fewer than 2 accumulation steps.

    Source: Keras 3.15, keras/src/optimizers/base_optimizer.py and rmsprop.py.
    """
    every = 1
    if gradient_accumulation_steps is not None:
        every = checked_steps('gradient_accumulation_steps', gradient_accumulation_steps, least=2)
    rate = learning_rate
    if callable(learning_rate):
        # The k-th step is taken at the last call of its window.
        rate = functools.partial(_at_last_call, learning_rate, every)
    step = precise_chain(
        _clipping_unless_zero(
            clipnorm=clipnorm, clipvalue=clipvalue, global_clipnorm=global_clipnorm
        ),
        rmsprop(
            rate,
            rho,
            epsilon,
            centered=centered,
            momentum=None if is_absent(momentum) else momentum,
            weight_decay=weight_decay,
            mask=mask,
            storage=storage,
        ),
    )
    step = precise_chain(
        None if loss_scale_factor is None else unscale('loss_scale_factor', loss_scale_factor),
        step if gradient_accumulation_steps is None else accumulate(step, every),
    )
    if not checked_flag('use_ema', use_ema):
        return step
    return chain(step, average_parameters(ema_momentum, ema_overwrite_frequency, every))


def _at_last_call(schedule: Any, every: int, count: ArrayLike) -> ArrayLike:
    # Calls saturate where steps do not yet.
    last = (jnp.iinfo(jnp.int32).max - (every - 1)) // every
    return schedule(jnp.minimum(count, last) * every + (every - 1))


@_framework(
    name=_NAME,
    jit_compile=_XLA,
    lr='tf_keras warns and ignores it: use learning_rate',
    decay='tf_keras refuses it too: use a schedule, or keras_legacy',
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

    The rule is that of `keras`. The average of the weights is not: it starts at the parameters::

        a  <- ema_momentum a + (1 - ema_momentum) p     in the first step from p before that step
        p  <- a                                       every ema_overwrite_frequency, 100 by default

    `fit` puts the average in the place of the parameters once more at its end
    (`finalize_variable_values`): take `optax.tree.get(state, 'ema')` for them. With `use_ema` this
    must be the last transformation of a chain, and needs `params`.

    Sparse gradients of embeddings move all rows in tf_keras, as dense ones do. Clipping differs
    where an index is repeated, since tf_keras clips before it adds up.

    Arguments are those of `keras`, but for these; there is no loss scale and no accumulation.

    Args:
      clipnorm: Not with `global_clipnorm`.
      clipvalue: Ignored, as in tf_keras, where `clipnorm` or `global_clipnorm` clips.
      ema_overwrite_frequency: None or a Python zero for never.

    Raises:
      ValueError: For both `clipnorm` and `global_clipnorm`.

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
    norms = {'clipnorm': clipnorm, 'global_clipnorm': global_clipnorm}
    values = {'clipvalue': clipvalue}
    by_norm, by_value = _clipping_unless_zero(**norms), _clipping_unless_zero(**values)
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
    never = ema_overwrite_frequency is None or is_absent(ema_overwrite_frequency)
    frequency = None if never else ema_overwrite_frequency
    return chain(step, average_parameters(ema_momentum, frequency, from_start=True))


@_framework(name=_NAME, lr='use learning_rate')
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

    Momentum moves epsilon: it is outside the root without, and inside it with, since TensorFlow's
    fused kernel takes over::

        nu <- rho nu + (1 - rho) g^2                                        from 0
        p  <- p - learning_rate g / (sqrt(nu) + epsilon)                    without momentum
        b  <- momentum b + learning_rate g / sqrt(nu + epsilon);  p <- p - b      with momentum

    A momentum given as an array counts as one, whatever its value, as in TensorFlow.

    Args:
      learning_rate: Step size, in the unit of the parameter.
      rho: Weight of the past in the running averages, in [0, 1].
      momentum: In [0, 1]; a Python zero means none.
      epsilon: In the unit of the gradient without momentum, in its square with. As in TensorFlow a
        Python zero, or None, means 1e-7.
      centered: Whether to divide by the standard deviation.
      clipnorm: Largest norm of each gradient array.
      clipvalue: Largest magnitude of each entry; applied before `clipnorm` or `global_clipnorm`.
      global_clipnorm: Largest norm of all gradients together; not with `clipnorm`.
      decay: The learning rate is divided by `1 + decay step`.
      sparse: Which gradients TensorFlow would get as `IndexedSlices`, as for `tensorflow`. It has
        an effect only with momentum, where TensorFlow's kernel skips rows that were not looked up.
        Without momentum their statistics decay, as those of dense gradients do.
      storage: How the statistics are kept in memory, as for `rmsprop`.

    tf_keras clips the gradient of each lookup of a row, and then adds them. A dense gradient holds
    their sum only: where ids repeat within a step, `clipnorm`, `clipvalue` and `global_clipnorm`
    cannot be reproduced here.

    Source: tf_keras 2.21, tf_keras/src/optimizers/legacy/rmsprop.py and optimizer_v2.py.
    """
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError('give clipnorm or global_clipnorm, not both.')
    plain = is_absent(momentum)
    sparse = checked_mask('sparse', sparse)
    dense = precise_chain(
        _clipping(clipvalue=clipvalue),
        _clipping(clipnorm=clipnorm, global_clipnorm=global_clipnorm),
        rmsprop(
            learning_rate if is_absent(decay) else _inverse_time_decay(learning_rate, decay),
            rho,
            1e-7 if epsilon is None or is_absent(epsilon) else epsilon,
            eps_in_sqrt=not plain,
            centered=centered,
            momentum=None if plain else momentum,
            storage=storage,
        ),
    )
    return dense if plain or sparse is False else skip_zero_rows(dense, sparse)


@_framework(name=_NAME, use_locking='updates are pure functions: leave it out')
def tensorflow(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-10,
    *,
    centered: bool = False,
    sparse: Any = False,
    storage: Storage | None = None,
) -> Optimizer:
    """`tf.compat.v1.train.RMSPropOptimizer`: the second moment starts at one.

    ::

        nu <- decay nu + (1 - decay) g^2                                    from 1
        b  <- momentum b + learning_rate g / sqrt(nu + epsilon);  p <- p - b

    Args:
      learning_rate: Step size, in the unit of the parameter.
      decay: Weight of the past in the running averages, in [0, 1].
      momentum: In [0, 1]. The buffer exists even at zero, as in TensorFlow.
      epsilon: Added inside the root, in the squared unit of the gradient.
      centered: Whether to divide by the standard deviation.
      sparse: Which gradients TensorFlow would get as `IndexedSlices`, such as those of embedding
        tables: a tree of booleans like the parameters, a function from them to one, or True for
        all. Rows (along the first axis) whose gradient is exactly zero keep their parameters and
        all their statistics. A row that was looked up and whose gradient happens to be zero looks
        the same, and is skipped too, where TensorFlow would let it decay. Needs `nu` and `var` in
        float32.
      storage: How the statistics are kept in memory, as for `rmsprop`.

    Source: TensorFlow 2.21, tensorflow/python/training/rmsprop.py and
    tensorflow/core/kernels/training_ops.cc.
    """
    dense = rmsprop(
        learning_rate,
        decay,
        epsilon,
        initial_scale=1.0,
        centered=centered,
        momentum=decay_rate('momentum', momentum).value,
        storage=storage,
    )
    return dense if sparse is False else skip_zero_rows(dense, sparse)


@_framework(foreach=_XLA)
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
      weight_decay: L2 penalty added to the gradient, or with `decoupled_decay` a share of the
        parameter, times the learning rate.
      momentum: In [0, 1]; a Python zero means none.
      centered: Whether to divide by the standard deviation.
      decoupled_decay: Whether weights decay apart from the gradient.
      corrected_weight_decay: Whether decoupled decay is scaled by `lr / max_lr` once more.
      lr_in_momentum: Whether the learning rate enters the momentum buffer, as in TensorFlow.
      caution: Whether entries of the buffer whose sign differs from the gradient's are held back,
        and the others enlarged by the share that is left (at most 1000 times). No effect without
        momentum. The buffer itself is not changed.
      max_lr: The rate the optimizer was made with in timm; `lr` itself where that is a number.
      mask: What decays.
      storage: How the statistics are kept in memory, as for `rmsprop`.

    Raises:
      ValueError: For `corrected_weight_decay` with a schedule and no `max_lr`.

    Source: timm 1.0.31, timm/optim/rmsprop_tf.py; caution: arXiv:2411.16085.
    """
    decoupled_decay = checked_flag('decoupled_decay', decoupled_decay)
    corrected_weight_decay = checked_flag('corrected_weight_decay', corrected_weight_decay)
    pace, velocity = scale_by_learning_rate(lr), _momentum(momentum, storage)
    order = (pace, velocity) if checked_flag('lr_in_momentum', lr_in_momentum) else (velocity, pace)
    root = rms_step(alpha, eps, initial_scale=1.0, centered=centered, storage=storage)
    step = precise_chain(root, *order)
    if checked_flag('caution', caution) and velocity is not None:
        step = cautious(step)
    if not decoupled_decay:
        return precise_chain(_coupled_decay(weight_decay, mask), step)
    peak = (lr if max_lr is None else max_lr) if corrected_weight_decay else None
    return precise_chain(step, _decoupled_decay(lr, weight_decay, peak, mask))


@_framework()
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

    Arguments are those of `torch`, but for `eps`, which is inside the root and thus in the squared
    unit of the gradient.

    Source: Stable-Baselines3 2.9, stable_baselines3/common/sb2_compat/rmsprop_tf_like.py.
    """
    return precise_chain(
        _coupled_decay(weight_decay, mask),
        rms_step(alpha, eps, initial_scale=1.0, centered=centered, storage=storage),
        _momentum(momentum, storage),
        scale_by_learning_rate(lr),
    )


_MXNET_REFUSED = {
    'use_fused_step': _XLA,
    'multi_precision': 'accumulators are float32 for narrow parameters: leave it out',
    'lr_scheduler': 'pass the schedule as learning_rate, shifted by one: MXNet counts from 1',
    'param_idx2name': 'trees have names: leave it out',
    'param_dict': 'use optax.partition for rates by parameter',
    'begin_num_update': 'shift the schedule instead',
    'aggregate_num': _XLA,
    'sym': 'it reads rates by parameter out of a graph: use optax.partition',
}


@_framework(**_MXNET_REFUSED, gamma1='use rho', gamma2='use momentum')
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
      momentum: In [0, 1]; used only when centered, as in MXNet.
      epsilon: In the unit of the gradient, or in its square when centered.
      centered: Whether to divide by the standard deviation.
      clip_weights: Largest magnitude of a parameter after the step; then `params` are needed and
        nothing may follow in a chain. Here and in `clip_gradient` a Python zero means none, as in
        MXNet.
      wd: L2 penalty, added to the clipped gradient.
      rescale_grad: What gradients are multiplied by.
      clip_gradient: Largest magnitude of a gradient's entry.
      mask: What decays.
      storage: How the statistics are kept in memory, as for `rmsprop`.

    Source: MXNet 2.0.0b1, python/mxnet/optimizer/rmsprop.py and src/operator/optimizer_op-inl.h.
    """
    prepare = (
        rescale('rescale_grad', rescale_grad),
        _clipping_unless_zero(clip_gradient=clip_gradient),
        _coupled_decay(wd, mask, 'wd'),
    )
    centered = checked_flag('centered', centered)
    step = rmsprop(
        learning_rate,
        rho,
        epsilon,
        eps_in_sqrt=centered,
        centered=centered,
        momentum=momentum if centered else None,
        storage=storage,
    )
    return _mxnet(prepare, step, clip_weights)


@_framework(**_MXNET_REFUSED)
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
    """`mxnet.optimizer.RMSProp` of MXNet 1: as `mxnet`, but for two lines.

    ::

        g <- clip(rescale_grad g + wd p, clip_gradient)
        p <- p - learning_rate g / sqrt(nu + epsilon)                 epsilon inside, always

    Arguments are those of `mxnet`; `rho` is called `gamma1` and `momentum` is called `gamma2`.

    Source: MXNet 1.9.1, python/mxnet/optimizer/optimizer.py and src/operator/optimizer_op-inl.h.
    """
    prepare = (
        rescale('rescale_grad', rescale_grad),
        _coupled_decay(wd, mask, 'wd'),
        _clipping_unless_zero(clip_gradient=clip_gradient),
    )
    step = rmsprop(
        learning_rate,
        gamma1,
        epsilon,
        centered=centered,
        momentum=gamma2 if centered else None,
        storage=storage,
    )
    return _mxnet(prepare, step, clip_weights)


def _mxnet(prepare: Sequence[Step | None], step: Step, clip_weights: ArrayLike | None) -> Optimizer:
    chained = precise_chain(*prepare, step)
    return (
        chained
        if clip_weights is None or is_absent(clip_weights)
        else chain(chained, clip_parameters('clip_weights', clip_weights))
    )


@_framework()
def graves(
    learning_rate: ScalarOrSchedule = 1e-4,
    decay: ScalarOrSchedule = 0.95,
    momentum: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-4,
    *,
    storage: Storage | None = None,
) -> Optimizer:
    """Graves 2013: always centered, epsilon inside the root, learning rate inside the momentum.

    ::

        n <- decay n + (1 - decay) g^2
        m <- decay m + (1 - decay) g
        b <- momentum b - learning_rate g / sqrt(n - m^2 + eps);  p <- p + b

    The paper gives no start values; ours, as everywhere, are 0.

    Source: Graves, Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850, equations
    38 to 45.
    """
    return rmsprop(learning_rate, decay, eps, centered=True, momentum=momentum, storage=storage)


@_framework()
def hinton(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    *,
    storage: Storage | None = None,
) -> Optimizer:
    """Hinton 2012: `nu <- 0.9 nu + 0.1 g^2` and `p <- p - learning_rate g / sqrt(nu)`, no epsilon.

    A zero second moment, which the slides leave open, gives a zero update.

    Source: Hinton, Srivastava and Swersky, Neural Networks for Machine Learning, lecture 6e.
    """
    return rmsprop(learning_rate, decay, eps=0.0, storage=storage)


def _momentum(
    momentum: ScalarOrSchedule, storage: Storage | None, of_pairs: bool = False
) -> Step | None:
    if is_absent(momentum):
        return None
    decay = decay_rate('momentum', momentum).value
    return trace_step(decay, storage=storage, of_pairs=of_pairs)


def _coupled_decay(
    weight_decay: ScalarOrSchedule, mask: Any, name: str = 'weight_decay'
) -> Step | None:
    if is_absent(weight_decay):
        return None
    return add_decayed_weights(weight_decay, mask, name)


def _clipping_unless_zero(**limits: ArrayLike | None) -> Step | None:
    """`_clipping`, where the framework takes a limit of zero for none."""
    kind = _clipping(**limits)
    return None if all(is_absent(value) for value in limits.values()) else kind


def _clipping(**limits: ArrayLike | None) -> Step | None:
    """The one kind of clipping that is asked for, if any."""
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f'give at most one of {", ".join(limits)}; got {", ".join(given)}.')
    clip = {'clipnorm': clip_each_norm, 'global_clipnorm': clip_global_norm}
    steps = [clip.get(name, clip_value)(name, value) for name, value in given.items()]
    return steps[0] if steps else None


def _decoupled_decay(
    lr: ScalarOrSchedule, weight_decay: ScalarOrSchedule, peak: Any, mask: Any
) -> Step | None:
    """`p <- p - lr weight_decay p`, times `lr / peak` where a peak is given."""
    if is_absent(weight_decay):
        return None
    if callable(peak):
        raise ValueError('corrected_weight_decay with a schedule needs max_lr, its peak.')
    if peak is None:
        return subtract_decayed_weights(lr, weight_decay, mask)
    top = constant('max_lr', peak)
    if is_absent(top):
        raise ValueError('max_lr must not be zero.')
    rate = Hyperparameter('lr', lr, lower=-math.inf)
    decay = Hyperparameter('weight_decay', weight_decay)

    def corrected(count: ArrayLike) -> Any:
        now = (jnp.asarray(x, float) for x in (rate.at(count), decay.at(count), top))
        pace, strength, peak = now
        return strength * (pace / peak)

    return subtract_decayed_weights(lr, corrected, mask)


def _inverse_time_decay(learning_rate: ScalarOrSchedule, decay: ScalarOrSchedule) -> Any:
    rate = Hyperparameter('learning_rate', learning_rate, lower=-math.inf)
    slope = Hyperparameter('decay', decay)

    def at(count: ArrayLike) -> Any:
        time = jnp.asarray(count, float)
        return cast(rate.at(count), time.dtype) / (1.0 + cast(slope.at(count), time.dtype) * time)

    return at
