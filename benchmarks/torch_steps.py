"""PyTorch's optimizers as contestants. Runs where torch is installed, through `worker`."""

import importlib

import torch

from benchmarks.timing import stopwatch
from benchmarks.works import DECAY, EPS, LEARNING_RATE, Shape


def versions() -> dict[str, str]:
    return {'torch': torch.__version__}


class TorchContestant:
    """`torch.optim.RMSprop` with gradients that stay the same, on the CPU or another `device`."""

    def __init__(self, name: str, shapes: list[Shape], options: dict, device: str) -> None:
        self._device = device
        self._params = [torch.zeros(s, device=device, requires_grad=True) for s in shapes]
        for param in self._params:
            param.grad = torch.randn_like(param)
        if name == 'bitsandbytes 8-bit':
            optimizer = importlib.import_module('bitsandbytes').optim.RMSprop8bit
        else:
            optimizer = torch.optim.RMSprop
            options = options | {'foreach': name != 'torch single'}
        self._optimizer = optimizer(self._params, LEARNING_RATE, alpha=DECAY, eps=EPS, **options)
        self._optimizer.step()  # makes the state
        self._step = self._optimizer.step
        if name == 'torch compiled':
            self._step = torch.compile(lambda: self._optimizer.step())
            self._step()

    def place(self) -> None:
        # Tensors stay the same objects, or the compiled step would be compiled anew.
        state = self._optimizer.state.values()
        moments = [x for leaf in state for x in leaf.values() if torch.is_tensor(x) and x.dim()]
        for tensor in (*self._params, *(param.grad for param in self._params), *moments):
            tensor.data = tensor.data.clone()

    def run(self, steps: int) -> float:
        def steps_in_a_row() -> None:
            for _ in range(steps):
                self._step()
            if self._device == 'cuda':
                torch.cuda.synchronize()

        return stopwatch(steps_in_a_row)


def prepare(name: str, shapes: list[Shape], options: dict) -> TorchContestant:
    torch.manual_seed(0)
    torch._dynamo.reset()
    device = options.get('device', 'cpu')
    options = {key: value for key, value in options.items() if key != 'device'}
    return TorchContestant(name, shapes, options, device)
