"""Long runs: how far averages are from what they should be, after any number of steps.

Shared by `test_long_runs.py` and `benchmarks.accelerator`; it needs no more than the package does.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from replaying import enable_x64

import rmsprop_jax
from rmsprop_jax import storage

EPS32 = float(np.finfo(np.float32).eps)
CHUNKS = 10
ENTRIES = 16
everywhere = functools.partial(storage.large_leaves, min_size=1, min_ndim=0)


def gradient_scale() -> np.ndarray:
    return 10.0 ** np.random.default_rng(0).uniform(-12, 8, ENTRIES)


def gradient(t: jax.Array) -> jax.Array:
    """Waves around offsets, of scales over twenty orders of magnitude; float32."""
    rng = np.random.default_rng(1)
    phase, speed = rng.uniform(0, 6, ENTRIES), rng.uniform(0.5, 1.5, ENTRIES)
    wave = jnp.sin(speed * t + phase) + 0.5
    return jnp.asarray(gradient_scale() * wave, jnp.float32)


OPTIONS = {
    'plain': {'decay': 0.9},
    'slow-momentum': {'decay': 0.999, 'momentum': 0.99},
    'centered-corrected': {'decay': 0.99, 'centered': True, 'bias_correction': True},
}


def drift(name: str, steps: int) -> tuple[float, float]:
    """The largest error of a float32 state beside float64, at ten times of a run, and its bound.

    One rounding a step, and a rounded decay, both remembered for 1 / (1 - decay) steps: the bound
    does not know the number of steps.
    """
    tx = rmsprop_jax.rmsprop(0.1, eps=0.0, **OPTIONS[name])

    def apart(state: Any, other: Any) -> jax.Array:
        """The largest errors: of moments and weights relative ones, of signed sums over their
        largest values."""

        def error(path: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path)
            if '.trace' in name:
                return (jnp.abs(x - y) / jnp.abs(y).max()).max()
            return (jnp.abs(x - y) / (gradient_scale() if '.mu' in name else jnp.abs(y))).max()

        errors = jax.tree_util.tree_map_with_path(error, state, other)
        floats = [x for x in jax.tree.leaves(errors) if x.dtype == jnp.float64]
        return jnp.stack(floats).max()

    def step(carry: Any, _: Any) -> Any:
        t, narrow, wide = carry
        g = gradient(t)
        _, narrow = tx.update(g, narrow)
        _, wide = tx.update(g.astype(jnp.float64), wide)
        return (t + 1, narrow, wide), None

    def chunk(carry: Any, _: Any) -> Any:
        carry, _ = jax.lax.scan(step, carry, length=steps // CHUNKS)
        return carry, apart(*carry[1:])

    with enable_x64(True):
        start = (0.0, *(tx.init(jnp.zeros(ENTRIES, d)) for d in (jnp.float32, jnp.float64)))
        (_, narrow, _), errors = jax.jit(lambda x: jax.lax.scan(chunk, x, length=CHUNKS))(start)
    if int(optax.tree.get_all_with_path(narrow, 'count')[0][1]) != steps:
        raise AssertionError('the count is not the number of steps')
    return float(np.asarray(errors).max()), EPS32 * (8 + 2 / (1 - OPTIONS[name]['decay']))


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Moments in a format over those in float32, at ten times of a run.

    Attributes:
      bias: The distance of their mean from one.
      trend: By what the mean of the later times exceeds that of the earlier ones.
      error: The standard error of the mean.
    """

    bias: float
    trend: float
    error: float

    @property
    def within(self) -> bool:
        """Whether neither is more than five of their standard errors, and these are small."""
        unbiased = abs(self.bias) < 5 * self.error
        return unbiased and abs(self.trend) < 5 * 2 * self.error and self.error < 0.01


def rounded_drift(kept: storage.Format, steps: int) -> Rounded:
    """What becomes of the moments of 256 entries in a format that rounds."""
    size = 256
    tx = rmsprop_jax.scale_by_rms(0.99, storage=everywhere(kept))
    exact = rmsprop_jax.scale_by_rms(0.99)
    # Within the window of bytes.
    change = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, size), jnp.float32)

    def step(carry: Any, _: Any) -> Any:
        t, rounded, true = carry
        g = change * jnp.sin(0.7 * t.astype(jnp.float32) + change)
        return (t + 1, tx.update(g, rounded)[1], exact.update(g, true)[1]), None

    def chunk(carry: Any, _: Any) -> Any:
        carry, _ = jax.lax.scan(step, carry, length=steps // CHUNKS)
        nu = storage.read(carry[1], everywhere(kept)).nu
        return carry, nu / carry[2].nu

    start = (jnp.int32(0), tx.init(change), exact.init(change))
    _, found = jax.jit(lambda x: jax.lax.scan(chunk, x, length=CHUNKS))(start)
    ratios = np.asarray(found, np.float64)
    late, early = ratios[CHUNKS // 2 :].mean(), ratios[: CHUNKS // 2].mean()
    # Chunks are far apart against the hundred steps that an average remembers.
    error = float(ratios.std() / np.sqrt(ratios.size))
    return Rounded(float(ratios.mean() - 1), float(late - early), error)
