"""Time of one update of one large leaf in each format, as a multiple of float32's, on this machine.

::

    python -m benchmarks.storage.cost build/storage-study
"""

import json
import sys
from pathlib import Path

from benchmarks.jax_steps import JaxContestant
from benchmarks.timing import Plan, Spread, interleave, ratios
from benchmarks.works import size
from rmsprop_jax import rmsprop, storage
from rmsprop_jax.aot._compile import update_and_apply

SHAPE = (4096, 4096)
BASE = 'float32'
FORMATS = {
    BASE: storage.float32(),
    'bfloat16': storage.bfloat16(),
    'uint8': storage.uint8(),
    'factored': storage.factored(),
}


def contestant(kept: storage.Format) -> JaxContestant:
    tx = rmsprop(1e-3, 0.99, storage=kept)
    return JaxContestant(update_and_apply(tx), tx.init, [SHAPE])


def main(folder: Path) -> None:
    seconds = interleave({name: contestant(kept) for name, kept in FORMATS.items()}, Plan())
    results = []
    for name, spread in {BASE: Spread(1, 1, 1), **ratios(seconds, BASE)}.items():
        results.append(
            {
                'format': name,
                'bytes': FORMATS[name].nbytes(SHAPE) / size([SHAPE]),
                'ratio': spread.median,
                'from': spread.low,
                'to': spread.high,
            }
        )
        print(json.dumps(results[-1]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'cost.json').write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
