"""The hardware to compile for, as data, and the abstract devices that represent it.

The TPU compiler knows its TPUs. For GPUs, this module gives the compiler a description with figures
from NVIDIA's public data sheets and architecture white papers.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from rmsprop_jax._command import install


class MissingPluginError(ImportError):
    """The compiler for a target is not installed.

    Attributes:
      extra: The extra of this package that installs it; the message names it too.
    """

    def __init__(self, target: str, extra: str) -> None:
        super().__init__(f'compiling for {target} needs its compiler: {install(extra)}')
        self.extra = extra


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of hardware.

    Attributes:
      platform: 'cpu', 'tpu' or 'cuda'.
      topology: The default devices to compile for.
      name: The name by which the TPU compiler or the GPU's driver knows it.
    """

    platform: str = 'cpu'
    topology: str = '1'
    name: str = ''


@dataclasses.dataclass(frozen=True)
class Gpu(Target):
    """One NVIDIA GPU, in bytes, bytes per second and hertz.

    Attributes:
      capability: The CUDA compute capability, major and minor.
      cores: The number of streaming multiprocessors.
      lanes: The number of float32 units per multiprocessor.
      shared: The shared memory per multiprocessor; a block can use all of it but one kilobyte.
      cache: The size of the level 2 cache.
      memory: The size of the device memory.
      bandwidth: The bandwidth of the device memory.
      clock: The boost clock.
    """

    platform: str = 'cuda'
    capability: tuple[int, int] = (0, 0)
    cores: int = 0
    lanes: int = 0
    shared: int = 0
    cache: int = 0
    memory: int = 0
    bandwidth: int = 0
    clock: float = 0.0

    def text(self) -> str:
        """The GPU's description in the compiler's format, a GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - 1024}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock / 1e9}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.name}"
"""


_TARGETS: dict[str, Target] = {
    'cpu': Target(),
    # A host has 2 x 2 chips, which is the smallest slice to compile for.
    'tpu-v4': Target('tpu', '2x2x1', 'v4'),
    'tpu-v5e': Target('tpu', '2x2', 'v5e'),
    'tpu-v5p': Target('tpu', '2x2x1', 'v5p'),
    'tpu-v6e': Target('tpu', '2x2', 'v6e'),
    'tpu-7x': Target('tpu', '2x2x1', 'tpu7x'),
    # NVIDIA A100 Tensor Core GPU Architecture, tables 1 and 4; data sheet of the 80 GB SXM part.
    'cuda-a100': Gpu(
        name='NVIDIA A100-SXM4-80GB',
        capability=(8, 0),
        cores=108,
        lanes=64,
        shared=164 * 1024,
        cache=40 * 2**20,
        memory=80 * 10**9,
        bandwidth=2_039 * 10**9,
        clock=1.41e9,
    ),
    # NVIDIA H100 Tensor Core GPU Architecture, tables 1 and 3; data sheet of the SXM5 part.
    'cuda-h100': Gpu(
        name='NVIDIA H100 80GB HBM3',
        capability=(9, 0),
        cores=132,
        lanes=128,
        shared=228 * 1024,
        cache=50 * 2**20,
        memory=80 * 10**9,
        bandwidth=3_350 * 10**9,
        clock=1.98e9,
    ),
    # NVIDIA Blackwell data sheet, HGX B200; CUDA's tuning guide for Blackwell (shared memory, L2).
    'cuda-b200': Gpu(
        name='NVIDIA B200',
        capability=(10, 0),
        cores=148,
        lanes=128,
        shared=228 * 1024,
        cache=126 * 2**20,
        memory=180 * 10**9,
        bandwidth=7_700 * 10**9,
        clock=1.965e9,
    ),
}

_PLUGINS = {'tpu': ('libtpu', 'aot-tpu'), 'cuda': ('jax_plugins.xla_cuda12', 'aot-cuda')}


def targets() -> tuple[str, ...]:
    """The names of the supported targets.

    Example:
      >>> from rmsprop_jax import aot
      >>> aot.targets()[:3]
      ('cpu', 'tpu-v4', 'tpu-v5e')
    """
    return tuple(_TARGETS)


def find(name: str) -> Target:
    """The target of that name.

    Raises:
      ValueError: If there is none.
    """
    if name not in _TARGETS:
        raise ValueError(f'target must be one of {", ".join(_TARGETS)}, got {name!r}.')
    return _TARGETS[name]


def devices(target: str, topology: str | int | None = None) -> Sequence[Any]:
    """Devices to compile for, to build meshes and the shardings of abstract arguments.

    TPU and GPU devices from this function cannot hold arrays. On a machine without such hardware,
    set `JAX_PLATFORMS=cpu` before importing JAX, or the plug-ins will look for it.

    Args:
      target: One of `targets()`.
      topology: For TPUs, the chips along each axis, in multiples of 2 x 2, such as '4x4' for v5e
        and v6e or '4x4x4' for v4, v5p and 7x (v4 and 7x have two devices per chip unless the
        compiler fuses them). For GPUs, the number in one host, or 'slices x hosts x GPUs', such as
        '1x2x8'. For the CPU, a number of devices of this process. None means one TPU host, one GPU
        or one CPU device.

    Raises:
      ValueError: If the target is unknown or cannot have this topology.
      MissingPluginError: If the compiler for the target is not installed.

    Example:
      >>> from rmsprop_jax import aot
      >>> [device.platform for device in aot.devices('cpu')]
      ['cpu']
    """
    kind = find(target)
    shape = str(kind.topology if topology is None else topology)
    if kind.platform == 'cpu':
        return _local(shape)
    _require(target, *_PLUGINS[kind.platform])
    if kind.platform == 'tpu' and 'TPU_SKIP_MDS_QUERY' in os.environ:
        # JAX has found no TPU here. Without these settings the library would ask a server which
        # slice it is on, and would allow only one process at a time.
        os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
        os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
        os.environ.setdefault('TPU_WORKER_ID', '0')
        os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    # Otherwise the CUDA plug-in looks for a driver and libraries that are needed only for running.
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
    try:
        if isinstance(kind, Gpu):
            layout = shape if 'x' in shape else f'1x1x{shape}'
            found = topologies.get_topology_desc(
                '', 'cuda', topology=layout, target_config=kind.text()
            )
        else:
            found = topologies.get_topology_desc(f'{kind.name}:{shape}', 'tpu')
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f'{target} has no topology {shape!r}: {error}') from error
    return found.devices


def _local(shape: str) -> Sequence[Any]:
    here = jax.local_devices(backend='cpu')
    if not shape.isdecimal() or not 1 <= int(shape) <= len(here):
        raise ValueError(f'topology of cpu must be a number from 1 to {len(here)}, got {shape!r}.')
    return here[: int(shape)]


def _require(target: str, module: str, extra: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise MissingPluginError(target, extra)
