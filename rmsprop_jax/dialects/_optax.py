"""Optax, whose function is `rmsprop_jax.rmsprop` and not a dialect."""

from rmsprop_jax.dialects._record import RECORDS, Dialect, Rule

RECORDS['optax'] = Dialect(
    title='`rmsprop_jax.rmsprop`',
    rules=(
        Rule(
            epsilon=('inside the root', 'outside the root'),
            start=('zero', 'one'),
            bias_correction=('no', 'yes'),
            momentum=('none', 'heavy ball', 'Nesterov'),
        ),
    ),
)
