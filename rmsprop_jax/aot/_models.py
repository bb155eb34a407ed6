"""Shapes of parameters to compile an optimizer for: a single leaf, and two networks."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_LEAF = re.compile(r'\d+(x\d+)*')


def shapes(model: str, dtype: DTypeLike = jnp.float32) -> Any:
    """Abstract parameters of 'resnet50', of 'transformer-LAYERS', or of one leaf like '4096x4096'.

    Raises:
      ValueError: For any other name.
    """
    sizes = [int(number) for number in re.findall(r'\d+', model)]
    if _LEAF.fullmatch(model) and all(sizes):
        tree: Any = {'w': tuple(sizes)}
    elif model == 'resnet50':
        tree = _resnet50()
    elif re.fullmatch(r'transformer-\d+', model) and all(sizes):
        tree = _transformer(*sizes)
    else:
        raise ValueError(
            'model must be resnet50, transformer-12 (or another number of layers, at least 1) or a '
            f'shape such as 4096x4096, without zeros; got {model!r}.'
        )
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), tree, is_leaf=lambda x: type(x) is tuple
    )


def _resnet50() -> dict[str, Any]:
    """He et al. 2015, table 1: 161 leaves, 25.6 million parameters."""
    tree: dict[str, Any] = {'stem': _convolution(7, 3, 64)}
    features = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            parts = {
                'reduce': _convolution(1, features, width),
                'spatial': _convolution(3, width, width),
                'expand': _convolution(1, width, 4 * width),
            }
            if block == 0:
                parts['shortcut'] = _convolution(1, features, 4 * width)
            tree[f'stage{stage}_block{block}'] = parts
            features = 4 * width
    tree['head'] = {'kernel': (features, 1000), 'bias': (1000,)}
    return tree


def _convolution(size: int, inputs: int, outputs: int) -> dict[str, Any]:
    """A convolution, and the scale and bias of its batch normalization."""
    return {'kernel': (size, size, inputs, outputs), 'scale': (outputs,), 'bias': (outputs,)}


def _transformer(layers: int, width: int = 768, vocabulary: int = 50257) -> dict[str, Any]:
    """The shapes of GPT-2. The smallest model has 12 layers: 148 leaves, 124 million parameters."""
    tree: dict[str, Any] = {
        'tokens': (vocabulary, width),
        'positions': (1024, width),
        'norm': _norm(width),
    }
    for layer in range(layers):
        tree[f'layer{layer}'] = {
            'norm_attention': _norm(width),
            'attention_in': _dense(width, 3 * width),
            'attention_out': _dense(width, width),
            'norm_mlp': _norm(width),
            'mlp_in': _dense(width, 4 * width),
            'mlp_out': _dense(4 * width, width),
        }
    return tree


def _norm(width: int) -> dict[str, Any]:
    return {'scale': (width,), 'bias': (width,)}


def _dense(inputs: int, outputs: int) -> dict[str, Any]:
    return {'kernel': (inputs, outputs), 'bias': (outputs,)}
