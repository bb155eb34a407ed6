"""Identifies the RMSProp that made a recorded run, and says how certain that is.

On the command line: `python -m rmsprop_jax.identify trace.npz`.
"""

from rmsprop_jax.identify._recording import Trace as Trace
from rmsprop_jax.identify._replay import Facts as Facts
from rmsprop_jax.identify._replay import PlainRule as PlainRule
from rmsprop_jax.identify._verdict import Candidate as Candidate
from rmsprop_jax.identify._verdict import Fact as Fact
from rmsprop_jax.identify._verdict import Identification as Identification
from rmsprop_jax.identify._verdict import Rival as Rival
from rmsprop_jax.identify._verdict import identify_dialect as identify_dialect

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
