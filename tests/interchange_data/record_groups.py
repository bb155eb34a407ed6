"""Records runs whose parameter groups say more, or less, than the numbers of an optimizer.

In `tests/`, where PyTorch, timm and Stable-Baselines3 are installed, but not JAX::

    python -m interchange_data.record_groups interchange_data/groups.npz

Every case is recorded halfway (`params`, `state`) and at its `end`, with the learning rate of every
update (`rates`). Gradients are those of `problem`; everything is float64.
"""

import importlib
import sys
from typing import Any

import numpy as np

from interchange_data import problem

Arrays = dict[str, np.ndarray]

HALF, END = 20, 40
# Two layers of the same shape, so that shapes cannot tell them apart.
SHAPES = {'a.weight': (3, 2), 'a.bias': (3,), 'b.weight': (3, 2), 'b.bias': (3,)}
# Of the case 'gradless': one parameter never has a gradient, another only in the first half.
NEVER, LATER = 'b.bias', 'b.weight'
# Of the case 'clipped', where neither has one, and the others are clipped at every step.
MAX_NORM = 0.5
# Of the case 'torchbeast', whose gradients are clipped at some steps.
SCALE = 10.0
# Of the case 'reordered': the optimizer is given the second layer first.
ORDER = ['b.weight', 'b.bias', 'a.weight', 'a.bias']
# Of the schedules: Stable-Baselines3 counts 5 environment steps an update here.
BATCH, TOTAL = 5, 5 * END
RATE = 2.0**-6


def params() -> Arrays:
    return {name: problem.wave(shape, 0.7, i) for i, (name, shape) in enumerate(SHAPES.items())}


def remaining(update: int) -> float:
    """The share of a training that lies ahead of an update."""
    return 1 - min(update * BATCH, TOTAL) / TOTAL


class Run:
    """A run of an optimizer on named parameters."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.p = {name: torch.tensor(p, requires_grad=True) for name, p in params().items()}
        self.rates: list[float] = []
        self.optimizer: Any = None

    def step(
        self,
        update: int,
        skipped: tuple[str, ...] = (),
        max_norm: float | None = None,
        scale: float = 1.0,
    ) -> None:
        now = {name: p.detach().numpy() for name, p in self.p.items()}
        for name, g in problem.gradient(now, update).items():
            self.p[name].grad = None if name in skipped else self.torch.tensor(scale * g)
        if max_norm is not None:
            self.torch.nn.utils.clip_grad_norm_(self.p.values(), max_norm)
        self.rates.append(self.optimizer.param_groups[0]['lr'])
        self.optimizer.step()

    def result(self) -> Arrays:
        return {name: p.detach().numpy().copy() for name, p in self.p.items()}

    def state(self) -> dict[str, Any]:
        """A copy of the state: PyTorch's own goes on changing."""
        found = self.optimizer.state_dict()
        entries = {
            number: {key: np.asarray(value).copy() for key, value in entry.items()}
            for number, entry in found['state'].items()
        }
        return {'state': entries, 'param_groups': found['param_groups']}

    def record(self, each: Any) -> dict[str, Any]:
        halfway: dict[str, Any] = {}
        for update in range(END):
            if update == HALF:
                halfway = {'params': self.result(), 'state': self.state()}
            each(update)
        return {**halfway, 'end': self.result(), 'rates': {'used': np.array(self.rates)}}


def gradless(torch: Any) -> dict[str, Any]:
    run = Run(torch)
    weights = [(name, p) for name, p in run.p.items() if p.ndim > 1]
    biases = [(name, p) for name, p in run.p.items() if p.ndim == 1]
    run.optimizer = torch.optim.RMSprop(
        [{'params': weights, 'momentum': 0.9}, {'params': biases, 'lr': RATE / 4}],
        lr=RATE,
        weight_decay=0.5,
    )
    return run.record(lambda update: run.step(update, (NEVER, LATER)[: 1 + (update >= HALF)]))


def clipped(torch: Any) -> dict[str, Any]:
    run = Run(torch)
    run.optimizer = torch.optim.RMSprop(run.p.items(), lr=RATE)
    return run.record(lambda update: run.step(update, (NEVER, LATER), MAX_NORM))


def reordered(torch: Any) -> dict[str, Any]:
    run = Run(torch)
    groups = [
        {'params': [run.p[name] for name in ORDER[:2]], 'lr': RATE},
        {'params': [run.p[name] for name in ORDER[2:]], 'lr': RATE / 64},
    ]
    run.optimizer = torch.optim.RMSprop(groups)
    recorded = run.record(run.step)
    names = {p: name for name, p in run.p.items()}
    found = [names[p] for group in run.optimizer.param_groups for p in group['params']]
    return {**recorded, 'names': {'found': np.array(found)}}


def stable_baselines3(torch: Any) -> dict[str, Any]:
    run = Run(torch)
    optimizer = importlib.import_module('golden.record_torch').rmsprop_tf_like()
    run.optimizer = optimizer(run.p.values(), lr=RATE, eps=1e-5, momentum=0.5)

    def each(update: int) -> None:
        # OnPolicyAlgorithm.learn counts the rollout first, and A2C.train sets the rate then.
        progress_remaining = 1.0 - float((update + 1) * BATCH) / float(TOTAL)
        for group in run.optimizer.param_groups:
            group['lr'] = progress_remaining * RATE
        run.step(update)

    return run.record(each)


def timm(torch: Any) -> dict[str, Any]:
    run = Run(torch)
    options: dict[str, Any] = {'momentum': 0.9, 'weight_decay': 0.1, 'decoupled_decay': True}
    optimizer = importlib.import_module('golden.record_torch').rmsprop_tf()
    run.optimizer = optimizer(list(run.p.items()), lr=RATE, corrected_weight_decay=True, **options)
    run.optimizer.param_groups[0]['lr'] = RATE / 2
    return run.record(run.step)


def scheduled(torch: Any, early: bool) -> dict[str, Any]:
    run = Run(torch)
    run.optimizer = torch.optim.RMSprop(run.p.items(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, remaining)

    def each(update: int) -> None:
        if early:
            scheduler.step()
        run.step(update)
        if not early:
            scheduler.step()

    return run.record(each)


def torchbeast(torch: Any) -> dict[str, Any]:
    """Its optimizer, its scheduler and the last four lines of `learn`, with its default flags."""
    run = Run(torch)
    run.optimizer = torch.optim.RMSprop(
        run.p.values(), lr=0.00048, momentum=0, eps=0.01, alpha=0.99
    )

    def lr_lambda(epoch: int) -> float:
        return 1 - min(epoch * BATCH, TOTAL) / TOTAL

    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lr_lambda)

    def each(update: int) -> None:
        run.step(update, max_norm=40.0, scale=SCALE)
        scheduler.step()

    return run.record(each)


def keys(torch: Any) -> dict[str, Any]:
    """What schedulers leave in the groups."""

    def left(make: Any) -> np.ndarray:
        optimizer = torch.optim.RMSprop([torch.zeros(1, requires_grad=True)], momentum=0.9)
        before = set(optimizer.param_groups[0])
        make(optimizer)
        return np.array(sorted(set(optimizer.param_groups[0]) - before))

    schedulers = torch.optim.lr_scheduler
    return {
        'LambdaLR': left(lambda tx: schedulers.LambdaLR(tx, remaining)),
        'CosineAnnealingLR': left(lambda tx: schedulers.CosineAnnealingLR(tx, 10)),
        'OneCycleLR': left(lambda tx: schedulers.OneCycleLR(tx, 0.1, total_steps=10)),
        'CyclicLR': left(lambda tx: schedulers.CyclicLR(tx, 0.1, 1.0)),
        'SWALR': left(lambda tx: torch.optim.swa_utils.SWALR(tx, 0.1)),
        'ReduceLROnPlateau': left(schedulers.ReduceLROnPlateau),
    }


def main(target: str) -> None:
    torch: Any = importlib.import_module('torch')
    cases = {
        'gradless': gradless(torch),
        'clipped': clipped(torch),
        'reordered': reordered(torch),
        'stable_baselines3': stable_baselines3(torch),
        'timm': timm(torch),
        'lambda': scheduled(torch, early=False),
        'lambda_early': scheduled(torch, early=True),
        'torchbeast': torchbeast(torch),
        'keys': {'left': keys(torch)},
    }
    arrays: Arrays = {}
    for case, results in cases.items():
        arrays |= problem.flat(case, results)
    np.savez_compressed(target, **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == '__main__':
    main(*sys.argv[1:])
