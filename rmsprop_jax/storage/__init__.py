"""How statistics are kept in memory between steps: formats, and the choice among them."""

from rmsprop_jax.storage._choice import Storage, large_leaves, per_leaf, per_statistic
from rmsprop_jax.storage._convert import check, convert, describe, read, saturation
from rmsprop_jax.storage._formats import (
    Factors,
    FactorsOfPairs,
    Format,
    bfloat16,
    factored,
    float32,
    uint8,
)

__all__ = [
    'Factors',
    'FactorsOfPairs',
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
