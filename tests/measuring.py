"""Measures each transformation once."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from rmsprop_jax.interchange._measure import Trial


@contextlib.contextmanager
def measured_once(known: dict[Any, Any]) -> Iterator[None]:
    """Keeps in `known` what has been measured of a transformation after some number of steps.

    It depends on nothing else in a state but its scalars.

    A conversion tries its transformation 18 times, which a test of many states need not repeat.
    """
    actions = Trial.actions

    def remembered(self: Trial, count: int) -> Any:
        if self.fault is not None:
            return {}
        scalars = [float(x) for x in jax.tree.leaves(self._state) if np.ndim(x) == 0]
        key = self.tx, count, tuple(scalars)
        if key not in known:
            known[key] = actions(self, count), self.fault
        found, self.fault = known[key]
        return dict(found)

    with mock.patch.object(Trial, 'actions', remembered):
        yield
