"""The main job with a network of one hidden layer, on few digits.

As a command it stops as at a power cut, at the start of a call:

    python tests/small_demo.py os.rename 6 --output ... (and the other options of the job)
"""

import functools
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest

from rmsprop_jax import demo

IMAGES = 96
whole_digits = demo.load_digits
whole_network = demo.network


@functools.cache
def digits() -> demo.Digits:
    return demo.Digits(*(images[:IMAGES] for images in whole_digits()))


def network(key: jax.Array) -> Any:
    from flax import nnx

    rngs = nnx.Rngs(key)
    return nnx.Sequential(
        lambda images: images.reshape(len(images), -1),
        nnx.Linear(64, 16, rngs=rngs),
        nnx.relu,
        nnx.Linear(16, 10, rngs=rngs),
    )


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(demo, 'load_digits', digits)
    patch.setattr(demo, 'network', network)


def kill_at(name: str, call: int, patch: pytest.MonkeyPatch) -> None:
    owner, _, attribute = name.rpartition('.')
    function: Callable[..., Any] = pkgutil.resolve_name(name)
    calls = 0

    @functools.wraps(function)
    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    patch.setattr(pkgutil.resolve_name(owner), attribute, killed)


if __name__ == '__main__':
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        kill_at(sys.argv[1], int(sys.argv[2]), patch)
        sys.exit(demo.main(sys.argv[3:]))
