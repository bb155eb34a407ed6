"""What is measured: trees of shapes, and forms of RMSProp. No framework is imported here."""

import itertools
import math

Shape = tuple[int, ...]

# Arguments common to `rmsprop_jax.rmsprop` and `optax.rmsprop`; other frameworks translate them.
VARIANTS: dict[str, dict] = {
    'plain': {},
    'momentum': {'momentum': 0.9},
    'centered, momentum': {'momentum': 0.9, 'centered': True},
}
LEARNING_RATE, DECAY, EPS = 1e-3, 0.9, 1e-8


def one_leaf(size: int = 2**25) -> list[Shape]:
    return [(size,)]


def many_leaves(count: int = 1000, size: int = 1000) -> list[Shape]:
    return [(size,)] * count


def mlp(widths: tuple[int, ...] = (784, 128, 64, 10)) -> list[Shape]:
    """Kernel and bias of each layer."""
    return [shape for a, b in itertools.pairwise(widths) for shape in ((a, b), (b,))]


def resnet50() -> list[Shape]:
    """ResNet-50 without its classifier: 159 leaves, 23.5 million numbers."""
    shapes = [*_convolution(7, 3, 64)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += _convolution(1, channels, width) + _convolution(3, width, width)
            shapes += _convolution(1, width, 4 * width)
            if block == 0:
                shapes += _convolution(1, channels, 4 * width)
            channels = 4 * width
    return shapes


def _convolution(size: int, channels: int, features: int) -> list[Shape]:
    return [(size, size, channels, features), (features,), (features,)]


def transformer(layers: int = 12, width: int = 384, vocabulary: int = 8192) -> list[Shape]:
    """A decoder as small as ViT-S: attention, a fourfold MLP and two norms a layer."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), *(norm + attention + norm + feed_forward) * layers, *norm]


def trees(quick: bool = False) -> dict[str, list[Shape]]:
    """The rows of the table; `quick` ones have few and small leaves, to try the harness."""
    if quick:
        return {'one leaf of 4096': one_leaf(4096), 'small MLP': mlp((8, 8, 4))}
    return {
        'one leaf of 32M': one_leaf(),
        'ResNet-50-like': resnet50(),
        '12-layer transformer': transformer(),
        '1000 leaves of 1000': many_leaves(),
        'small MLP': mlp(),
    }


def size(shapes: list[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
