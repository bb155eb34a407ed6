"""Learning rates that frameworks' schedules give, in double precision, for docs/schedules.md.

    python -m golden.record_schedules torch golden/schedules_torch.json

The first column of the page's tables is the code that is recorded here.
"""

import importlib.util
import json
import sys
import types

TORCH = {
    'StepLR(optimizer, 10, gamma=0.1)': 30,
    'MultiStepLR(optimizer, [5, 15], gamma=0.1)': 30,
    'ConstantLR(optimizer, 0.5, total_iters=5)': 30,
    'LinearLR(optimizer, 0.25, total_iters=5)': 30,
    'ExponentialLR(optimizer, 0.9)': 30,
    'PolynomialLR(optimizer, 20, power=2.0)': 30,
    # Later it would rise again.
    'CosineAnnealingLR(optimizer, 20, eta_min=0.001)': 21,
    'OneCycleLR(optimizer, 0.1, total_steps=30)': 30,
    'LambdaLR(optimizer, lambda epoch: 0.95**epoch)': 30,
    'SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=5), '
    'ExponentialLR(optimizer, 0.9)], [5])': 30,
    # torchvision's references/classification: --lr-scheduler cosineannealinglr --epochs 20
    # --lr-warmup-epochs 5 --lr-warmup-method linear --lr-warmup-decay 0.01
    'SequentialLR(optimizer, [LinearLR(optimizer, 0.01, total_iters=5), '
    'CosineAnnealingLR(optimizer, 15)], [5])': 20,
}
KERAS = (
    'ExponentialDecay(0.1, 10, 0.9)',
    'ExponentialDecay(0.1, 10, 0.9, staircase=True)',
    'PiecewiseConstantDecay([5, 15], [0.1, 0.01, 0.001])',
    'PolynomialDecay(0.1, 20, 0.001, power=2.0)',
    'InverseTimeDecay(0.1, 10, 0.5)',
    'CosineDecay(0.1, 20, alpha=0.01)',
    'CosineDecay(0.01, 15, warmup_target=0.1, warmup_steps=5)',
    'CosineDecayRestarts(0.1, 10, t_mul=2.0, m_mul=0.5)',
)
# The arguments of timm's train.py, at --lr 0.1 and with four updates an epoch.
TIMM = (
    '--sched cosine --epochs 6 --warmup-epochs 2 --warmup-lr 0.01 --min-lr 0.001',
    '--sched cosine --epochs 6 --warmup-epochs 2 --warmup-lr 0.01 --min-lr 0.001 --warmup-prefix',
    '--sched step --epochs 6 --decay-epochs 2 --decay-rate 0.5 --warmup-epochs 1 --warmup-lr 0.01',
)
UPDATES_PER_EPOCH = 4


def optimizer():
    import torch

    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def torch_rates(code, steps):
    import torch

    stepped = optimizer()
    scheduler = eval(code, vars(torch.optim.lr_scheduler) | {'optimizer': stepped})
    found = []
    for step in range(steps):
        found.append(stepped.param_groups[0]['lr'])
        stepped.step()
        if step < steps - 1:
            scheduler.step()
    return found


def timm_schedulers():
    """timm's schedulers alone: the rest of timm wants torchvision, which is not installed."""
    if 'timm' not in sys.modules:
        package = types.ModuleType('timm')
        package.__path__ = importlib.util.find_spec('timm').submodule_search_locations
        sys.modules['timm'] = package
    return importlib.import_module('timm.scheduler')


def timm_rates(arguments, on_updates):
    """As timm 1.0.31's train.py does it."""
    create_scheduler_v2 = timm_schedulers().create_scheduler_v2
    words, options = arguments.split(), {}
    while words:
        name = words.pop(0).removeprefix('--').replace('-', '_')
        is_flag = not words or words[0].startswith('--')
        options[name] = True if is_flag else words.pop(0)
    epochs, kind = json.loads(options.pop('epochs')), options.pop('sched')
    numbers = {name: x if x is True else json.loads(x) for name, x in options.items()}
    stepped = optimizer()
    scheduler, epochs = create_scheduler_v2(
        stepped,
        kind,
        num_epochs=epochs,
        step_on_epochs=not on_updates,
        updates_per_epoch=UPDATES_PER_EPOCH,
        cooldown_epochs=0,
        **numbers,
    )
    found, updates = [], 0
    for epoch in range(epochs):
        for _ in range(UPDATES_PER_EPOCH):
            found.append(stepped.param_groups[0]['lr'])
            updates += 1
            scheduler.step_update(num_updates=updates)
        scheduler.step(epoch + 1)
    return found


def keras_rates(code):
    """In the dtype of the first rate, which is float32 where that is a Python number."""
    import keras
    import numpy as np

    def wide(x):
        if isinstance(x, list):
            return [wide(item) for item in x]
        return np.float64(x) if isinstance(x, float) else x

    def in_double(kind):
        return lambda *args, **options: kind(
            *map(wide, args), **{name: wide(x) for name, x in options.items()}
        )

    kinds = vars(keras.optimizers.schedules).items()
    schedule = eval(code, {name: in_double(x) for name, x in kinds if isinstance(x, type)})
    return [float(schedule(step)) for step in range(30)]


def recorded(framework):
    if framework == 'keras':
        return {code: keras_rates(code) for code in KERAS}
    rates = {code: torch_rates(code, steps) for code, steps in TORCH.items()}
    for arguments in TIMM:
        rates[arguments] = timm_rates(arguments, on_updates=False)
        rates[f'{arguments} --sched-on-updates'] = timm_rates(arguments, on_updates=True)
    return rates


if __name__ == '__main__':
    framework, path = sys.argv[1:]
    with open(path, 'w') as file:
        file.write(json.dumps(recorded(framework), indent=1) + '\n')
