"""How statistics are kept in memory between steps: formats, and the choice among them."""

from rmsprop_jax.storage._choice import Storage as Storage
from rmsprop_jax.storage._choice import large_leaves as large_leaves
from rmsprop_jax.storage._choice import per_leaf as per_leaf
from rmsprop_jax.storage._choice import per_statistic as per_statistic
from rmsprop_jax.storage._convert import check as check
from rmsprop_jax.storage._convert import convert as convert
from rmsprop_jax.storage._convert import describe as describe
from rmsprop_jax.storage._convert import read as read
from rmsprop_jax.storage._convert import saturation as saturation
from rmsprop_jax.storage._formats import Factors as Factors
from rmsprop_jax.storage._formats import Format as Format
from rmsprop_jax.storage._formats import bfloat16 as bfloat16
from rmsprop_jax.storage._formats import factored as factored
from rmsprop_jax.storage._formats import float32 as float32
from rmsprop_jax.storage._formats import uint8 as uint8

__all__ = [
    'Factors',
    'Format',
    'Storage',
    'bfloat16',
    'check',
    'convert',
    'describe',
    'factored',
    'float32',
    'large_leaves',
    'per_leaf',
    'per_statistic',
    'read',
    'saturation',
    'uint8',
]
__dir__ = __all__.copy
