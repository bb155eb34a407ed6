"""The compiled kernel: found, loaded and registered when it is first asked for."""

import ctypes
import functools
import pathlib
import re

import jax.ffi

TARGET = 'rmsprop_jax_fused_apply'


@functools.cache
def available() -> bool:
    """Whether the kernel was compiled, and this processor and this JAX can run it."""
    path = pathlib.Path(__file__).with_name('kernel.so')
    if not path.exists():
        return False
    library = ctypes.CDLL(str(path))
    if not library.RmspropJaxFusedSupported() or library.RmspropJaxFusedApiMinor() > _api_minor():
        return False
    handler = jax.ffi.pycapsule(library.RmspropJaxFusedApply)
    jax.ffi.register_ffi_target(TARGET, handler, platform='cpu')
    return True


def _api_minor() -> int:
    """The minor version of the interface to compiled kernels that the installed JAX has."""
    header = pathlib.Path(jax.ffi.include_dir(), 'xla', 'ffi', 'api', 'c_api.h').read_text()
    found = re.search(r'#define XLA_FFI_API_MINOR (\d+)', header)
    return int(found[1]) if found else 0
