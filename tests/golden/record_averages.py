"""Records the averages of weights of PyTorch, timm and TensorFlow over 100 updates, in float64.

In `tests/`, where the framework is installed::

    python -m golden.record_averages torch golden/averages_torch.json
    python -m golden.record_averages tensorflow golden/averages_tensorflow.json

A model has one weight, which is `sin(n)` after update n, and one buffer, which is `cos(n)`. The
files hold the average of the weight after every update, and of the buffer after the last one.
"""

import importlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

UPDATES, DECAY = 100, 0.9
# timm's `update_after_step`, and torchvision's updates of the average in its warm-up.
LATE = 20
WEIGHTS, BUFFERS = np.sin(np.arange(UPDATES + 1.0)), np.cos(np.arange(UPDATES + 1.0))


def record_torch() -> dict[str, Any]:
    torch: Any = importlib.import_module('torch')
    timm = importlib.import_module('golden.record_torch').load('timm', 'timm/utils/model_ema.py')
    swa = torch.optim.swa_utils

    def model() -> Any:
        made = torch.nn.Module()
        made.weight = torch.nn.Parameter(torch.tensor(WEIGHTS[0]))
        made.register_buffer('buffer', torch.tensor(BUFFERS[0]))
        return made

    def run(make: Callable[[Any], Any], update: Callable[[Any, Any, int], Any]) -> dict[str, Any]:
        here, found = model(), []
        average = make(here)
        inside = average.ema if isinstance(average, timm.ModelEma) else average.module
        for n in range(1, UPDATES + 1):
            with torch.no_grad():
                here.weight.fill_(WEIGHTS[n])
                here.buffer.fill_(BUFFERS[n])
            update(average, here, n)
            found.append(inside.weight.item())
        return {'weight': found, 'buffer': inside.buffer.item()}

    def plainly(average: Any, here: Any, n: int) -> None:
        average.update(here)

    def with_step(average: Any, here: Any, n: int) -> None:
        average.update(here, step=n)

    def by_parameters(average: Any, here: Any, n: int) -> None:
        average.update_parameters(here)

    def like_torchvision(average: Any, here: Any, n: int) -> None:
        # As its training loop, whose update n is in the warm-up.
        average.update_parameters(here)
        if n <= LATE:
            average.n_averaged.fill_(0)

    def v3(**options: Any) -> Callable[[Any], Any]:
        return lambda here: timm.ModelEmaV3(here, DECAY, **options)

    def averaged(**options: Any) -> Callable[[Any], Any]:
        return lambda here: swa.AveragedModel(
            here, multi_avg_fn=swa.get_ema_multi_avg_fn(DECAY), **options
        )

    def torchvision(here: Any) -> Any:
        return swa.AveragedModel(
            here, avg_fn=lambda a, p, _: DECAY * a + (1 - DECAY) * p, use_buffers=True
        )

    found = {
        'ModelEma': run(lambda here: timm.ModelEma(here, DECAY), plainly),
        'ModelEmaV2': run(lambda here: timm.ModelEmaV2(here, DECAY), plainly),
        'ModelEmaV3': run(v3(), plainly),
        'ModelEmaV3 step': run(v3(), with_step),
        'ModelEmaV3 step late': run(v3(update_after_step=LATE), with_step),
        'ModelEmaV3 step warmup': run(v3(use_warmup=True), with_step),
        'ModelEmaV3 step warmup late': run(
            v3(use_warmup=True, update_after_step=LATE, warmup_power=0.75), with_step
        ),
        'AveragedModel': run(averaged(use_buffers=True), by_parameters),
        'AveragedModel without buffers': run(averaged(), by_parameters),
        'torchvision': run(torchvision, like_torchvision),
    }
    return found | {'versions': {name: version(name) for name in ('torch', 'timm')}}


def record_tensorflow() -> dict[str, Any]:
    tf: Any = importlib.import_module('tensorflow')

    def run(counted: bool) -> dict[str, Any]:
        count = tf.Variable(0)
        average = tf.train.ExponentialMovingAverage(DECAY, num_updates=count if counted else None)
        weight, buffer = tf.Variable(WEIGHTS[0]), tf.Variable(BUFFERS[0])
        found = []
        for n in range(UPDATES + 1):
            count.assign(n)
            weight.assign(WEIGHTS[n])
            buffer.assign(BUFFERS[n])
            # The first call makes the averages, with the values at that time.
            average.apply([weight, buffer])
            found.append(float(average.average(weight)))
        return {'weight': found[1:], 'buffer': float(average.average(buffer))}

    found = {'num_updates': run(counted=True), 'plain': run(counted=False)}
    return found | {'versions': {'tensorflow_cpu': version('tensorflow_cpu')}}


def main(framework: str, target: str) -> None:
    recorders = {'torch': record_torch, 'tensorflow': record_tensorflow}
    Path(target).write_text(json.dumps(recorders[framework]()) + '\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
