"""Optimizer state and parameters to and from PyTorch, Keras 3, TensorFlow 1 and Optax.

Everything passes as plain mappings of arrays: no framework is imported, and whatever `np.asarray`
takes is taken. Only `read_checkpoint` opens files, and needs PyTorch for PyTorch's own. A sequence
of `Pair`s says which of their names is which of our paths, and how the axes lie; `torch.linear`,
`torch.conv`, `torch.norm` and their like in `keras` make the common ones. The same pairs move the
parameters, with `parameters_from` and `parameters_to`.

State goes into a transformation that you make, wherever in it the state sits: in a chain, under
`optax.masked`, `optax.partition`, `optax.MultiSteps` or `inject_hyperparams`. All or nothing: one
`InterchangeError` lists every entry that is missing, left over, of the wrong shape or kind, or not
finite, and nothing is dropped, filled in or reshaped silently.

What differs between the frameworks' buffers and ours, and is taken care of:

| theirs | ours |
|---|---|
| `square_avg`, `velocity`, `rms`, Optax's `nu` | `nu`; when centered, `var = nu - |mu|^2 / c` |
| `grad_avg`, `average_gradient`, `mg`, Optax's `mu` | `mu` |
| PyTorch's `momentum_buffer` (learning rate outside it) | `trace` of `dialects.torch` |
| Keras's and TensorFlow's `momentum` (learning rate inside it) | `-trace` of their dialects |
| Optax's `trace` | `trace` of `rmsprop` |

A velocity goes to the other side of the learning rate too, while that is constant: what `tx` makes
of one is measured, and so is whether it contradicts what the checkpoint says of itself.

`c` is 1, or with bias correction the sum of the weights, `1 - decay^count`. Where the variance is
small beside `|mu|^2`, the difference has no more digits than their `nu` left in it. It is taken in
float64, kept from falling below zero, and a `LossyConversionWarning` names where that happened.
"""

from rmsprop_jax.interchange import keras as keras
from rmsprop_jax.interchange import nnx as nnx
from rmsprop_jax.interchange import optax as optax
from rmsprop_jax.interchange import tensorflow as tensorflow
from rmsprop_jax.interchange import torch as torch
from rmsprop_jax.interchange._files import Checkpoint as Checkpoint
from rmsprop_jax.interchange._files import read_checkpoint as read_checkpoint
from rmsprop_jax.interchange._mapping import AS_IS as AS_IS
from rmsprop_jax.interchange._mapping import KERNEL as KERNEL
from rmsprop_jax.interchange._mapping import InterchangeError as InterchangeError
from rmsprop_jax.interchange._mapping import Layout as Layout
from rmsprop_jax.interchange._mapping import Pair as Pair
from rmsprop_jax.interchange._mapping import flattened as flattened
from rmsprop_jax.interchange._mapping import parameters_from as parameters_from
from rmsprop_jax.interchange._mapping import parameters_to as parameters_to
from rmsprop_jax.interchange._port import Port as Port
from rmsprop_jax.interchange._port import from_checkpoint as from_checkpoint
from rmsprop_jax.interchange._port import restore_port as restore_port
from rmsprop_jax.interchange._port import save_template as save_template
from rmsprop_jax.interchange._propose import Proposal as Proposal
from rmsprop_jax.interchange._propose import propose_pairs as propose_pairs
from rmsprop_jax.interchange._state import LossyConversionWarning as LossyConversionWarning
from rmsprop_jax.interchange.keras import from_keras as from_keras
from rmsprop_jax.interchange.keras import to_keras as to_keras
from rmsprop_jax.interchange.optax import from_optax as from_optax
from rmsprop_jax.interchange.optax import to_optax as to_optax
from rmsprop_jax.interchange.tensorflow import from_tensorflow as from_tensorflow
from rmsprop_jax.interchange.tensorflow import to_tensorflow as to_tensorflow
from rmsprop_jax.interchange.torch import from_torch as from_torch
from rmsprop_jax.interchange.torch import to_torch as to_torch
from rmsprop_jax.interchange.torch import torch_optimizer as torch_optimizer

__all__ = [
    'AS_IS',
    'KERNEL',
    'Checkpoint',
    'InterchangeError',
    'Layout',
    'LossyConversionWarning',
    'Pair',
    'Port',
    'Proposal',
    'flattened',
    'from_checkpoint',
    'from_keras',
    'from_optax',
    'from_tensorflow',
    'from_torch',
    'keras',
    'nnx',
    'optax',
    'parameters_from',
    'parameters_to',
    'propose_pairs',
    'read_checkpoint',
    'restore_port',
    'save_template',
    'tensorflow',
    'to_keras',
    'to_optax',
    'to_tensorflow',
    'to_torch',
    'torch',
    'torch_optimizer',
]
__dir__ = __all__.copy
