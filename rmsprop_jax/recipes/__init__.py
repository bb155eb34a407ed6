"""Published set-ups that train with RMSProp: as data, and each as one function.

A function returns the whole chain of its source: clipping, the dialect, the schedule, and weight
decay. Some TensorFlow sources add `weight_decay * l2_loss(p)` to the loss. Since `l2_loss` has a
factor 1/2, this adds `weight_decay p` to the gradient. The chain does so before the dialect: leave
the term out of your loss. Every value was read in the named source or, where a recipe says
'second-hand', in someone's account of it.

**The loss's reduction is part of a recipe.** RMSProp is blind to the scale of gradients only as far
as epsilon is small. A loss that is averaged over k terms, where the source sums them, has gradients
k times smaller, and takes the same steps only with the start value of the second moment and an
epsilon inside the root divided by k^2, and an epsilon outside it, a clipping norm and a coupled
weight decay divided by k. Recipes whose source sums have an argument `mean_over`, which does that.

Some sources evaluate an average of the weights. The optimizer does not keep it: use `ema_init` and
`ema_update` beside the optimizer.

Example:
  >>> import jax, jax.numpy as jnp, optax
  >>> from rmsprop_jax import recipes
  >>> tx = recipes.efficientnet(steps_per_epoch=100, batch_size=2048)
  >>> params = {'dense': {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}}
  >>> average, state = recipes.ema_init(params), tx.init(params)
  >>> for step in range(3):
  ...     gradients = jax.tree.map(jnp.ones_like, params)
  ...     updates, state = tx.update(gradients, state, params)
  ...     params = optax.apply_updates(params, updates)
  ...     average = recipes.ema_update(average, params, step + 1, decay=0.9999)
  >>> bool(params['dense']['bias'][0] < average['dense']['bias'][0] < 0)
  True
"""

from rmsprop_jax.recipes._agents import (
    a3c,
    baselines_a2c,
    dopamine_dqn,
    dqn_nature,
    impala_atari,
    impala_dmlab,
    impala_dmlab30,
    impala_torchbeast,
    sb3_a2c,
    sb3_a2c_tf_like,
)
from rmsprop_jax.recipes._average import ema_init, ema_update
from rmsprop_jax.recipes._masks import (
    describe_mask,
    slim_decay_mask,
    tensorflow_decay_mask,
    timm_decay_mask,
)
from rmsprop_jax.recipes._networks import (
    efficientnet,
    efficientnet_timm,
    graves,
    inception_v3,
    mnasnet,
    mobilenet_v2,
    mobilenet_v3_timm,
    wgan,
    wgan_clamp,
)
from rmsprop_jax.recipes._records import RECIPES, Recipe, Staircase, table

__all__ = [
    'RECIPES',
    'Recipe',
    'Staircase',
    'a3c',
    'baselines_a2c',
    'describe_mask',
    'dopamine_dqn',
    'dqn_nature',
    'efficientnet',
    'efficientnet_timm',
    'ema_init',
    'ema_update',
    'graves',
    'impala_atari',
    'impala_dmlab',
    'impala_dmlab30',
    'impala_torchbeast',
    'inception_v3',
    'mnasnet',
    'mobilenet_v2',
    'mobilenet_v3_timm',
    'sb3_a2c',
    'sb3_a2c_tf_like',
    'slim_decay_mask',
    'table',
    'tensorflow_decay_mask',
    'timm_decay_mask',
    'wgan',
    'wgan_clamp',
]
__dir__ = __all__.copy
