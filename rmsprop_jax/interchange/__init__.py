"""Optimizer state and parameters to and from PyTorch, Keras 3, TensorFlow 1 and Optax.

States are plain mappings of arrays: no framework is imported, and anything that `np.asarray`
accepts can be passed. Only `read_checkpoint` opens files; it needs PyTorch for PyTorch's own files.
A sequence of `Pair`s maps their names to our paths and describes how the axes differ.
`torch.linear`, `torch.conv`, `torch.norm` and their counterparts in `keras` make the common pairs.
With the same pairs, `parameters_from` and `parameters_to` convert the parameters.

You make the transformation that receives the state. Its RMSProp state may be anywhere: in a chain,
under `optax.masked`, `optax.partition`, `optax.MultiSteps` or `inject_hyperparams`. A conversion is
all or nothing: one `InterchangeError` lists every entry that is missing, left over, of the wrong
shape or kind, or not finite. Nothing is dropped, filled in or reshaped silently.

These differences between the frameworks' buffers and ours are converted:

| theirs | ours |
|---|---|
| `square_avg`, `velocity`, `rms`, Optax's `nu` | `nu`; when centered, `var = nu - |mu|^2 / c` |
| `grad_avg`, `average_gradient`, `mg`, Optax's `mu` | `mu` |
| PyTorch's `momentum_buffer` (learning rate outside it) | `trace` of `dialects.torch` |
| Keras's and TensorFlow's `momentum` (learning rate inside it) | `-trace` of their dialects |
| Optax's `trace` | `trace` of `rmsprop` |

If the learning rate is constant, a velocity is also converted to the other side of it. To do so,
the conversion measures what `tx` does with a velocity. It also checks that `tx` does not contradict
the settings in the checkpoint.

`c` is 1, or with bias correction the sum of the weights, `1 - decay^count`. If the variance is
small compared with `|mu|^2`, the difference has only the digits that remain in their `nu`. It is
computed in float64 and set to 0 where it is negative; a `LossyConversionWarning` says where.
"""

from rmsprop_jax.interchange import keras, nnx, optax, tensorflow, torch
from rmsprop_jax.interchange._files import Checkpoint, read_checkpoint
from rmsprop_jax.interchange._mapping import (
    AS_IS,
    KERNEL,
    InterchangeError,
    Layout,
    Pair,
    flattened,
    parameters_from,
    parameters_to,
)
from rmsprop_jax.interchange._port import Port, from_checkpoint, restore_port, save_template
from rmsprop_jax.interchange._propose import Proposal, propose_pairs
from rmsprop_jax.interchange._state import LossyConversionWarning
from rmsprop_jax.interchange.keras import from_keras, to_keras
from rmsprop_jax.interchange.optax import from_optax, to_optax
from rmsprop_jax.interchange.tensorflow import from_tensorflow, to_tensorflow
from rmsprop_jax.interchange.torch import from_torch, to_torch, torch_optimizer

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
