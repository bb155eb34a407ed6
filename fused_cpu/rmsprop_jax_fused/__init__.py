"""RMSProp that changes parameters and state in place, in one pass over memory, on CPUs."""

from rmsprop_jax_fused._library import available as available
from rmsprop_jax_fused._optimizer import FusedTransformation as FusedTransformation
from rmsprop_jax_fused._optimizer import rmsprop as rmsprop

__version__ = '0.1.0'
