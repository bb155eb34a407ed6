"""Records Optax 0.2.8: `python -m identify_data.record_optax` in `tests/`."""

import jax
import jax.numpy as jnp
import optax
from identify_data.draws import SHAPES, Arrays, Draw, record


def run(draw: Draw) -> list[Arrays]:
    rates = jnp.asarray(draw.learning_rate)
    made = optax.rmsprop(
        lambda count: rates[count],
        decay=draw.decay,
        eps=draw.eps,
        initial_scale=1.0 if draw.from_one and not draw.corrected else 0.0,
        eps_in_sqrt=draw.eps_inside,
        centered=draw.centered,
        momentum=draw.momentum or None,
        nesterov=draw.nesterov,
        bias_correction=draw.corrected,
    )
    params = {name: jnp.asarray(draw.params[name]) for name in SHAPES}
    state, after = made.init(params), []
    for step in range(len(rates)):
        gradients = {name: jnp.asarray(draw.gradient(name, step)) for name in SHAPES}
        updates, state = made.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        params = {name: p.astype(draw.dtype) for name, p in params.items()}
        after.append({name: jax.device_get(p) for name, p in params.items()})
    return after


if __name__ == '__main__':
    jax.config.update('jax_enable_x64', True)
    record('optax', 16, run)
