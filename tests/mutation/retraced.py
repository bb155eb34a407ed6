"""A plugin of pytest: while mutmut sees which functions a test calls, each test traces anew.

A function that JAX has compiled for an earlier test is not called again, and the later test would
not be counted among those that reach it.
"""

import os

import jax


def pytest_runtest_setup() -> None:
    if os.environ.get('MUTANT_UNDER_TEST') == 'stats':
        jax.clear_caches()
