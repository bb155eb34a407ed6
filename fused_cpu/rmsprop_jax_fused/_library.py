"""The compiled kernel: found, loaded and registered when it is first asked for."""

import ctypes
import functools
import pathlib

import jax.ffi

TARGET = 'rmsprop_jax_fused_apply'


@functools.cache
def available() -> bool:
    """Whether the kernel was compiled, and this processor can run it."""
    path = pathlib.Path(__file__).with_name('kernel.so')
    if not path.exists():
        return False
    library = ctypes.CDLL(str(path))
    if not library.RmspropJaxFusedSupported():
        return False
    handler = jax.ffi.pycapsule(library.RmspropJaxFusedApply)
    jax.ffi.register_ffi_target(TARGET, handler, platform='cpu')
    return True
