"""Eight CPU devices for every test, set before anything imports jax."""

import os

# Pytest's workers share the processors already: no program is compiled in parts at a time.
os.environ['XLA_FLAGS'] = ' '.join(
    [
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        '--xla_cpu_parallel_codegen_split_count=1',
    ]
)
