"""PyTorch's optimizers as contestants. Runs where torch is installed, through `worker`."""

import torch

from benchmarks.timing import stopwatch
from benchmarks.works import DECAY, EPS, LEARNING_RATE, Shape


def versions() -> dict[str, str]:
    return {'torch': torch.__version__}


class TorchContestant:
    """`torch.optim.RMSprop` with gradients that stay the same."""

    def __init__(self, name: str, shapes: list[Shape], options: dict) -> None:
        self._params = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        for param in self._params:
            param.grad = torch.randn_like(param)
        self._optimizer = torch.optim.RMSprop(
            self._params,
            LEARNING_RATE,
            alpha=DECAY,
            eps=EPS,
            foreach=name != 'torch single',
            **options,
        )
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

        return stopwatch(steps_in_a_row)


def prepare(name: str, shapes: list[Shape], options: dict) -> TorchContestant:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return TorchContestant(name, shapes, options)
