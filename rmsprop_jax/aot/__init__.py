"""Compiles steps ahead of time, from shapes alone, for hardware that need not be present.

`compile_update` compiles an optimizer's update and its application to the parameters;
`compile_step` compiles any function. Both return a `Report`. Nothing is executed: a report says
what the program does to memory, not which numbers it computes. See docs/backends.md.
"""

from rmsprop_jax.aot._compile import Report, compile_step, compile_update, table
from rmsprop_jax.aot._program import Collective
from rmsprop_jax.aot._targets import MissingPluginError, devices, targets

__all__ = [
    'Collective',
    'MissingPluginError',
    'Report',
    'compile_step',
    'compile_update',
    'devices',
    'table',
    'targets',
]
__dir__ = __all__.copy
