"""Eight CPU devices for every test, set before anything imports jax; a share of the tests."""

import os

import pytest

# Pytest's workers share the processors already: no program is compiled in parts at a time.
os.environ['XLA_FLAGS'] = ' '.join(
    [
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        '--xla_cpu_parallel_codegen_split_count=1',
    ]
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With EXTENDED_EVERY=8 in the environment, every eighth of the extended tests is run."""
    every = int(os.environ.get('EXTENDED_EVERY', '1'))
    extended = [item for item in items if item.get_closest_marker('extended')]
    left_out = {*extended} - {*extended[::every]}
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]
