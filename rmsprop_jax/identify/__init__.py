"""Identifies the RMSProp that made a recorded run, and says how certain that is.

On the command line: `python -m rmsprop_jax.identify trace.npz`.
"""

from rmsprop_jax.identify._recording import Trace
from rmsprop_jax.identify._replay import Facts, PlainRule
from rmsprop_jax.identify._verdict import Candidate, Fact, Identification, Rival, identify_dialect

__all__ = [
    'Candidate',
    'Fact',
    'Facts',
    'Identification',
    'PlainRule',
    'Rival',
    'Trace',
    'identify_dialect',
]
__dir__ = __all__.copy
