"""Records the PyTorch program that an introductory text prints: Net 10-5-1, RMSprop, 100 epochs.

In `tests/`: `python -m golden.record_worked_example ../notebooks/data/worked_example.npz`.

The text sets no seed; this program does, and records in float32 what it drew: `x`, `y` and the
initial weights, under PyTorch's names. It trains from these numbers in float32 and in float64, and
records the losses and the lines that the text's program prints.
"""

import sys

import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim

# The first one that was tried.
SEED = 0


class Net(nn.Module):
    """The network of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 5)
        self.fc2 = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The prediction for each row."""
        return self.fc2(torch.relu(self.fc1(x)))


def train(net: Net, x: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Trains `net` by the loop of the text; returns the loss and the line of each epoch."""
    optimizer = optim.RMSprop(net.parameters(), lr=0.01)
    losses, lines = [], []
    for epoch in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().numpy())
        lines.append(f'Epoch [{epoch + 1}/100], Loss: {loss.item():.4f}')
    return np.array(losses), np.array(lines)


def main() -> None:
    """Draws the data and the weights, trains twice and writes everything to one file."""
    torch.manual_seed(SEED)
    x = torch.randn(100, 10)
    y = torch.randn(100, 1)
    net = Net()
    drawn = {'x': x, 'y': y, **net.state_dict()}
    arrays = {name: tensor.numpy().copy() for name, tensor in drawn.items()}
    wide = Net().double()
    wide.load_state_dict(net.state_dict())
    for dtype, run in {
        'float32': train(net, x, y),
        'float64': train(wide, x.double(), y.double()),
    }.items():
        arrays[f'losses_{dtype}'], arrays[f'lines_{dtype}'] = run
    about = f'PyTorch {torch.__version__}, torch.manual_seed({SEED})'
    np.savez_compressed(sys.argv[1], about=np.array(about), **arrays)


if __name__ == '__main__':
    main()
