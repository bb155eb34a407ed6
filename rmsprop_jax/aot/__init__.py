"""Compiles steps ahead of time, from shapes alone, for hardware that need not be present.

`compile_update` compiles an optimizer's update and its application to the parameters;
`compile_step` compiles any function. Both return a `Report`. Nothing is executed: a report says
what the program does to memory, not which numbers it computes. See docs/backends.md.
"""

from rmsprop_jax.aot._compile import Report as Report
from rmsprop_jax.aot._compile import compile_step as compile_step
from rmsprop_jax.aot._compile import compile_update as compile_update
from rmsprop_jax.aot._compile import table as table
from rmsprop_jax.aot._program import Collective as Collective
from rmsprop_jax.aot._targets import MissingPluginError as MissingPluginError
from rmsprop_jax.aot._targets import devices as devices
from rmsprop_jax.aot._targets import targets as targets

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
