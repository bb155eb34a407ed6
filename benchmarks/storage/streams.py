"""Synthetic gradients that are hard on a storage format."""

import dataclasses

import jax
import jax.numpy as jnp

STEPS = 2000


@dataclasses.dataclass(frozen=True)
class Stream:
    """Gradients as a function of the step: what a format meets in training, all at once.

    Each coordinate has a scale of its own, lognormally distributed over decades within one row,
    signs at random and lognormal noise. One gradient in ten thousand is a hundred times too large.
    A quarter of the rows are silent but for one step in fifty, as an embedding's are. At half time
    half of the columns grow a hundredfold and the others shrink a hundredfold.

    Attributes:
      seed: Of the scales and of every draw.
      rows: The gradient's leading axis.
      columns: The gradient's last axis.
      size: Median scale of a coordinate, or of each row's.
      decades: Standard deviation of the scale's decimal logarithm.
      mean: What each gradient is shifted by, in units of its coordinate's scale.
      dtype: Of the gradients, which are clipped to its range.
      eventful: Whether spikes, silence and the change at half time happen.
    """

    seed: int
    rows: int = 64
    columns: int = 768
    size: float | tuple[float, ...] = 1e-3
    decades: float = 1.0
    mean: float = 0.0
    dtype: str = 'float32'
    eventful: bool = True

    def __call__(self, step: jax.Array | int) -> jax.Array:
        shape = (self.rows, self.columns)
        at_start, in_time = jax.random.split(jax.random.key(self.seed))
        scale = 10 ** (self.decades * jax.random.normal(at_start, shape, jnp.float32))
        scale *= jnp.reshape(jnp.asarray(self.size, jnp.float32), (-1, 1))
        noise, sign, spike, active = jax.random.split(jax.random.fold_in(in_time, step), 4)
        gradient = jnp.exp(jax.random.normal(noise, shape, jnp.float32))
        gradient = self.mean + gradient * jax.random.rademacher(sign, shape, jnp.float32)
        if self.eventful:
            gradient *= jnp.where(jax.random.bernoulli(spike, 1e-4, shape), 100.0, 1.0)
            growth = jnp.where(jnp.arange(self.columns) < self.columns // 2, 100.0, 0.01)
            gradient *= jnp.where(step >= STEPS // 2, growth, 1.0)
            seldom = jnp.arange(self.rows) < self.rows // 4
            awake = ~seldom | jax.random.bernoulli(active, 0.02, (self.rows,))
            gradient *= awake[:, None]
        limit = float(jnp.finfo(self.dtype).max)
        gradient = gradient.astype(jnp.float32) * scale
        return jnp.clip(gradient, -limit, limit).astype(self.dtype)
