"""Steps of bitsandbytes' RMSprop8bit on recorded gradients, where PyTorch and bitsandbytes are.

::

    python benchmarks/storage/peer.py build/storage-study
"""

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
from metrics import exact_steps, step_errors


def steps(gradients: np.ndarray, optimizer: Any, **options: float) -> np.ndarray:
    """What the optimizer subtracts from a parameter of zero at a learning rate of 1."""
    parameter = torch.nn.Parameter(torch.zeros(gradients.shape[1:]))
    tx = optimizer([parameter], lr=1.0, **options)
    taken = np.empty_like(gradients)
    for gradient, step in zip(gradients, taken, strict=True):
        parameter.data.zero_()
        parameter.grad = torch.from_numpy(gradient.copy())
        tx.step()
        step[...] = -parameter.data.numpy()
    return taken


def main(folder: Path) -> None:
    results = []
    for case in json.loads((folder / 'steps-cases.json').read_text()):
        gradients = np.load(folder / f'gradients-{case["stream"]}.npy')
        options = {'alpha': case['decay'], 'eps': case['eps']}
        truth = np.stack(list(exact_steps(gradients, case['decay'], case['eps'])))
        errors = step_errors(steps(gradients, bitsandbytes.optim.RMSprop8bit, **options), truth)
        results.append(case | {'format': 'bitsandbytes RMSprop8bit'} | errors)
        print(results[-1], flush=True)
    (folder / 'steps-peer.json').write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
