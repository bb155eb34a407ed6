"""Frameworks whose RMSProp is one of our dialects under other names and defaults, as data."""

import dataclasses

from rmsprop_jax.dialects._record import as_markdown


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """A framework's RMSProp, and what to write for it here.

    Attributes:
      framework: The framework's name for it, with the version that was read.
      theirs: Its signature, with its defaults.
      ours: The call that gives the same updates with the same defaults, as an expression in
        `rmsprop_jax`'s names and the learning rate `lr`.
      quirks: What to know before relying on it.
    """

    framework: str
    theirs: str
    ours: str
    quirks: str = ''


EQUIVALENTS = (
    Equivalent(
        'Optax 0.2.8 `optax.rmsprop`',
        'learning_rate, decay=0.9, eps=1e-8, initial_scale=0, eps_in_sqrt=True, centered=False, '
        'momentum=None, nesterov=False, bias_correction=False',
        'rmsprop(lr)',
        'Accumulators in the dtype of the parameters. Complex arrays share one second moment '
        'between real and imaginary part, as here.',
    ),
    Equivalent(
        'Sonnet 2 `snt.optimizers.RMSProp`',
        'learning_rate, decay=0.9, momentum=0.0, epsilon=1e-10, centered=False',
        'rmsprop(lr, eps=1e-10, momentum=0.0)',
        'Epsilon as in TensorFlow 1, but starts at zero. Sparse gradients touch only their rows: '
        '`dialects.keras_legacy(lr, momentum=jnp.array(0.0), epsilon=1e-10, sparse=True)`.',
    ),
    Equivalent(
        'Chainer 7 `RMSprop`',
        'lr=0.01, alpha=0.99, eps=1e-8, eps_inside_sqrt=False',
        'dialects.torch(lr)',
        'No momentum. With `eps_inside_sqrt`: `rmsprop(lr, 0.99)`.',
    ),
    Equivalent(
        'Chainer 7 `RMSpropGraves`',
        'lr=1e-4, alpha=0.95, momentum=0.9, eps=1e-4',
        'dialects.graves(lr)',
    ),
    Equivalent(
        'Paddle `paddle.optimizer.RMSProp`',
        'learning_rate, rho=0.95, epsilon=1e-6, momentum=0.0, centered=False, weight_decay=None',
        'rmsprop(lr, 0.95, eps=1e-6, momentum=0.0)',
        'Its momentum is not Nesterov, though its documentation says so. `weight_decay` is an L2 '
        'term: chain `optax.add_decayed_weights` before.',
    ),
    Equivalent(
        'Caffe2 `RmsProp`',
        'decay=0.9, momentum=0.0, epsilon=1e-5; learning rate and accumulators are inputs',
        'rmsprop(lr, eps=1e-5, momentum=0.0)',
        'The caller supplies the accumulators: set `initial_scale` to their first value.',
    ),
    Equivalent(
        'MLX `mlx.optimizers.RMSprop`',
        'learning_rate, alpha=0.99, eps=1e-8',
        'dialects.torch(lr)',
        'No momentum, centering or weight decay; `eps` must be positive.',
    ),
    Equivalent(
        'Optimisers.jl `RMSProp`',
        'eta=0.001, rho=0.9, epsilon=1e-8; centred=false',
        'dialects.torch(lr, 0.9)',
        'Complex arrays share one second moment between real and imaginary part: '
        '`rmsprop(lr, eps_in_sqrt=False)`. For Float16 its epsilon is at least 1e-7.',
    ),
    Equivalent(
        '`jax.example_libraries.optimizers.rmsprop`',
        'step_size, gamma=0.9, eps=1e-8',
        'rmsprop(lr)',
        'Squares complex numbers themselves, where we square their magnitude.',
    ),
    Equivalent(
        '`jax.example_libraries.optimizers.rmsprop_momentum`',
        'step_size, gamma=0.9, eps=1e-8, momentum=0.9',
        'rmsprop(lr, momentum=0.9)',
        'As above.',
    ),
    Equivalent(
        'bitsandbytes 0.50 `RMSprop`, `RMSprop32bit`',
        'lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False',
        'dialects.torch(lr)',
        '`momentum` is accepted and ignored; `centered` and `alpha=0` raise. Its 8-bit form rounds '
        'the second moment, and on CUDA lets `weight_decay` reach the second moment only.',
    ),
)


def table() -> str:
    """All of `EQUIVALENTS` as a Markdown table.

    Example:
      >>> from rmsprop_jax import dialects
      >>> print(dialects.table().splitlines()[0])
      | framework | its arguments | write | quirks |
    """
    header = ('framework', 'its arguments', 'write', 'quirks')
    rows = [(e.framework, f'`{e.theirs}`', f'`{e.ours}`', e.quirks) for e in EQUIVALENTS]
    return as_markdown(header, rows)
