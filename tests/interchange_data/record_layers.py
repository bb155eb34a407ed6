"""Records layers of PyTorch whose arrays have no counterpart of the same kind or number in Flax.

In `tests/`, where PyTorch is installed, but not JAX::

    python -m interchange_data.record_layers interchange_data/layers.npz

Every layer is trained for `HALF` updates. Then its arrays (`weights`, buffers included), its
optimizer (`state`), its `output` in evaluation, and its arrays one update later (`end`) are kept.
Everything is float64.
"""

import importlib
import sys
from typing import Any

import numpy as np

from interchange_data import problem

HALF = 5
FEATURES, HIDDEN, BATCH = 3, 4, 6
SETTINGS = {'lr': 2.0**-6, 'alpha': 0.9, 'momentum': 0.5, 'weight_decay': 0.01}
LAYERS = ('batch_norm', 'lstm', 'gru')


def inputs(layer: str, update: int) -> np.ndarray:
    """The batch of an update: an image with its channels second, or a sequence's entry."""
    shape = (BATCH, FEATURES, 2, 2) if layer == 'batch_norm' else (BATCH, FEATURES)
    return 1.5 + problem.wave(shape, 1.7, 0.3 * update)


def carry(which: int) -> np.ndarray:
    """The hidden state (0) or the memory (1) that a cell is given."""
    return problem.wave((BATCH, HIDDEN), 0.9, 1.0 + which)


def target(like: Any) -> np.ndarray:
    return problem.wave(tuple(like.shape), 2.1)


def _outputs(torch: Any, layer: str, module: Any, update: int) -> dict[str, Any]:
    x, *carried = map(torch.tensor, (inputs(layer, update), carry(0), carry(1)))
    if layer == 'batch_norm':
        return {'y': module(x)}
    if layer == 'gru':
        return {'h': module(x, carried[0])}
    return dict(zip('hc', module(x, tuple(carried)), strict=True))


def record(path: str) -> None:
    torch: Any = importlib.import_module('torch')
    arrays: dict[str, np.ndarray] = {}
    for layer in LAYERS:
        module = {
            'batch_norm': lambda: torch.nn.BatchNorm2d(FEATURES),
            'lstm': lambda: torch.nn.LSTMCell(FEATURES, HIDDEN),
            'gru': lambda: torch.nn.GRUCell(FEATURES, HIDDEN),
        }[layer]().double()
        for i, p in enumerate(module.parameters()):
            p.data = torch.tensor(0.5 + 0.5 * problem.wave(tuple(p.shape), 2.3, 0.1 * i))
        # Within a container, so that arrays have the layer's name in theirs.
        whole = torch.nn.ModuleDict({layer: module})
        optimizer = torch.optim.RMSprop(whole.named_parameters(), **SETTINGS)

        def step(update: int, layer: str = layer, module: Any = module, tx: Any = optimizer):
            found = _outputs(torch, layer, module, update).values()
            loss = sum(((y - torch.tensor(target(y))) ** 2).mean() for y in found)
            tx.zero_grad()
            loss.backward()
            tx.step()

        def kept(whole: Any = whole) -> dict[str, np.ndarray]:
            return {name: x.numpy().copy() for name, x in whole.state_dict().items()}

        for update in range(HALF):
            step(update)
        found = optimizer.state_dict()
        entries = {
            number: {key: value.numpy().copy() for key, value in entry.items()}
            for number, entry in found['state'].items()
        }
        case: dict[str, Any] = {'weights': kept()}
        case['state'] = {'state': entries, 'param_groups': found['param_groups']}
        module.eval()
        with torch.no_grad():
            outputs = _outputs(torch, layer, module, HALF)
        case['output'] = {name: y.numpy().copy() for name, y in outputs.items()}
        module.train()
        step(HALF)
        arrays |= problem.flat(layer, case | {'end': kept()})
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == '__main__':
    record(sys.argv[1])
