"""RMSProp as each framework computes it: its argument names, order and defaults.

Every function here is a short chain of this package's transformations and Optax's. `table()` lists
the frameworks that compute one of these under another name, each with the call that reproduces it.
An optimizer prints as the call that made it:

    >>> from rmsprop_jax import dialects
    >>> dialects.hinton(1e-3)
    rmsprop_jax.dialects.hinton(learning_rate=0.001, decay=0.9)

Three things apply to all dialects. Where a framework subtracts `mu^2` from `nu` and turns NaN on
gradients that hardly change, we carry the variance itself and stay finite. Accumulators are float32
for narrower parameters. As in the frameworks, a Python zero turns momentum or weight decay off, and
`update` then needs no parameters for it; an array keeps it on, whatever its value.
"""

# Tables and messages follow this order. Importing a module registers its dialect.
# isort: off
from rmsprop_jax.dialects._torch import torch, torch_clip_grad_norm
from rmsprop_jax.dialects._keras import keras
from rmsprop_jax.dialects._tf_keras import tf_keras
from rmsprop_jax.dialects._keras_legacy import keras_legacy
from rmsprop_jax.dialects._tensorflow import tensorflow
from rmsprop_jax.dialects._timm import timm
from rmsprop_jax.dialects._stable_baselines3 import stable_baselines3
from rmsprop_jax.dialects import _optax as _optax
from rmsprop_jax.dialects._mxnet import mxnet, mxnet1
from rmsprop_jax.dialects._mindspore import mindspore
from rmsprop_jax.dialects._graves import graves
from rmsprop_jax.dialects._hinton import hinton
from rmsprop_jax.dialects._other_frameworks import Equivalent, table
from rmsprop_jax.dialects._record import differences

__all__ = [
    'Equivalent',
    'differences',
    'graves',
    'hinton',
    'keras',
    'keras_legacy',
    'mindspore',
    'mxnet',
    'mxnet1',
    'stable_baselines3',
    'table',
    'tensorflow',
    'tf_keras',
    'timm',
    'torch',
    'torch_clip_grad_norm',
]
__dir__ = __all__.copy
