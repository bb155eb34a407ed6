"""Checks and times a real accelerator: `python -m benchmarks.accelerator`.

It needs a checkout, and JAX for the accelerator with Optax, Chex and NumPy. What it compares with
is that of the tests, from modules that need nothing else.
"""

import os
import sys

from benchmarks.worker import ROOT

sys.path.append(str(ROOT / 'tests'))
# PyTorch, in a process of its own, needs memory on the same device.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
