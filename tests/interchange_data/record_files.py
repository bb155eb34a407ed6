"""Records a run in the files that PyTorch's users have, and the steps after it.

In `tests/`, where PyTorch and safetensors are installed, but not JAX::

    python -m interchange_data.record_files interchange_data/files

`run.pt` and `run.safetensors` are of a training of `HANDOVER` steps in float64,
`dtypes.safetensors` has one array of each dtype, and `code.pt` holds what only a full unpickler
would read. `run.npz` has what `run.pt` says, for those without PyTorch, and the run after another
`AFTER` steps.
"""

import importlib
import sys
from typing import Any

import numpy as np

from interchange_data import problem

HANDOVER, AFTER = 12, 3
WORDS, LENGTH, CHANNELS = 11, 8, 5
BATCH = 4
OPTIONS: dict[str, Any] = {'lr': 2.0**-8, 'alpha': 0.9, 'momentum': 0.75, 'weight_decay': 2.0**-6}


def tokens(step: int) -> np.ndarray:
    return (np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) ** 2 + 3 * step) % WORDS


def targets(step: int) -> np.ndarray:
    return problem.wave((BATCH, 3), 0.9, step)


def model(torch: Any) -> Any:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(WORDS, 6)
            self.conv = torch.nn.Conv1d(6, CHANNELS, 3, padding=1)
            self.norm = torch.nn.BatchNorm1d(CHANNELS)
            self.hidden = torch.nn.Linear(CHANNELS * LENGTH, 7)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(7, 7), torch.nn.Linear(7, 3)])

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.norm(self.conv(self.embed(x).transpose(1, 2))))
            x = torch.tanh(self.hidden(x.flatten(1)))
            return self.layers[1](torch.tanh(self.layers[0](x)))

    made = Net().double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(torch.tensor((p.ndim == 1) + problem.wave(tuple(p.shape), 2.3, i)) / 2)
    return made


def main(folder: str) -> None:
    torch: Any = importlib.import_module('torch')
    save_file = importlib.import_module('safetensors.torch').save_file
    net = model(torch)
    optimizer = torch.optim.RMSprop(net.parameters(), **OPTIONS)

    def advance(first: int, steps: int) -> None:
        for step in range(first, first + steps):
            optimizer.zero_grad()
            loss = ((net(torch.tensor(tokens(step))) - torch.tensor(targets(step))) ** 2).mean()
            loss.backward()
            optimizer.step()

    def arrays(named: Any) -> dict[str, np.ndarray]:
        return {name: x.detach().numpy().copy() for name, x in named.items()}

    advance(0, HANDOVER)
    found = {'model': net.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': 3}
    torch.save(found, f'{folder}/run.pt')
    save_file(net.state_dict(), f'{folder}/run.safetensors', metadata={'format': 'pt'})
    state = {number: arrays(entry) for number, entry in found['optimizer']['state'].items()}
    halfway = {'state': state, 'param_groups': found['optimizer']['param_groups']}
    before = arrays(net.state_dict())
    advance(HANDOVER, AFTER)
    recorded = {'model': before, 'state': halfway, 'after': arrays(net.state_dict())}
    np.savez_compressed(f'{folder}/run.npz', **problem.flat('run', recorded))
    kinds = ['bool', 'uint8', 'int8', 'int16', 'int32', 'int64', 'float16', 'float32', 'float64']
    kinds += ['bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'uint16', 'uint32', 'uint64', 'complex64']
    one = {kind: torch.tensor([[0.0, 1.0, 1.0]]).to(getattr(torch, kind)) for kind in kinds}
    save_file(one, f'{folder}/dtypes.safetensors')
    torch.save({'model': {'w': torch.ones(2)}, 'code': Foreign()}, f'{folder}/code.pt')


class Foreign:
    """Unpickling it would call a function."""

    def __reduce__(self) -> Any:
        return print, ('this must not be printed',)


if __name__ == '__main__':
    main(*sys.argv[1:])
