"""Replays recorded draws with this package: one line for each framework, and an exit status."""

import json
import sys
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from golden.problems import fingerprint, problem
from replaying import difference, replay

# Rounding: 24 steps of 1e-16 each, amplified where a framework subtracts to find a variance.
LIMIT = 1e-12
# bitsandbytes computes in float32 only; its roundings add up as a random walk does.
NARROW_LIMIT = 4 * 2.0**-24 * 24**0.5


def limit(configuration: dict[str, Any]) -> float:
    return LIMIT if configuration['dtype'] == 'float64' else NARROW_LIMIT


def compare(configuration: dict[str, Any], theirs: np.ndarray, drawn: str) -> float:
    """The largest relative difference; infinite where the two do not even compare."""
    if fingerprint(problem(configuration)) != drawn:
        print(f'{configuration["name"]}: the two NumPys draw different gradients')
        return float('inf')
    with jax.enable_x64(configuration['dtype'] == 'float64'):
        try:
            ours = replay(configuration)
        except Exception as error:
            # One failure must not hide the others.
            print(f'{configuration["name"]} raised {error!r}')
            return float('inf')
    same = ours.shape == theirs.shape and np.isfinite(theirs).all()
    found = difference(ours, theirs) if same else float('nan')
    return found if np.isfinite(found) else float('inf')


def main(paths: list[str]) -> int:
    failures = 0
    for path in paths:
        with np.load(path) as file:
            about = json.loads(str(file['about']))
            found = defaultdict(list)
            for configuration in about['configurations']:
                name = configuration['name']
                worst = compare(configuration, file[name], about['fingerprints'][name])
                found[configuration['framework']].append((worst, configuration))
        versions = ', '.join(f'{n} {v}' for n, v in about['versions'].items())
        print(f'{versions}:')
        for framework, results in found.items():
            worst, configuration = max(results, key=lambda result: result[0])
            print(f'  {framework}: {len(results)} configurations, worst difference {worst:.1e}')
            wrong = [c for d, c in results if d > limit(c)]
            for c in wrong:
                print(f'    differs: {json.dumps(c)}')
            failures += len(wrong)
        if not found:
            print('    nothing was compared')
            failures += 1
    print(f'{failures} failures')
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
