"""RMSProp for JAX: exact, stable, small and fast, as Optax gradient transformations."""

from typing import TYPE_CHECKING

from rmsprop_jax import dialects, recipes, sharding, storage
from rmsprop_jax._carry_over import CarriedOver, carry_over
from rmsprop_jax._labels import labels_by_path
from rmsprop_jax._momentum import trace
from rmsprop_jax._nonfinite import nonfinite_entries, skip_nonfinite
from rmsprop_jax._optimizer import inject_hyperparams, rmsprop
from rmsprop_jax._parameters import round_parameters
from rmsprop_jax._precondition import scale_by_rms, scale_by_stddev
from rmsprop_jax._reset import reset
from rmsprop_jax._transforms import cautious
from rmsprop_jax._types import RmsState, TraceState

if TYPE_CHECKING:
    from rmsprop_jax import diagnostics, identify, interchange
    from rmsprop_jax.identify import identify_dialect

__all__ = [
    'CarriedOver',
    'RmsState',
    'TraceState',
    '__version__',
    'carry_over',
    'cautious',
    'diagnostics',
    'dialects',
    'identify',
    'identify_dialect',
    'inject_hyperparams',
    'interchange',
    'labels_by_path',
    'nonfinite_entries',
    'recipes',
    'reset',
    'rmsprop',
    'round_parameters',
    'scale_by_rms',
    'scale_by_stddev',
    'sharding',
    'skip_nonfinite',
    'storage',
    'trace',
]
__dir__ = __all__.copy

__version__ = '0.1.0'


def __getattr__(name: str) -> object:
    """The tools, which take as long to import as all the rest, when they are first asked for."""
    from importlib import import_module

    if name in ('diagnostics', 'identify', 'interchange'):
        return import_module(f'rmsprop_jax.{name}')
    if name == 'identify_dialect':
        return import_module('rmsprop_jax.identify').identify_dialect
    raise AttributeError(f"module 'rmsprop_jax' has no attribute {name!r}")
