"""Checks an accelerator against the CPU, and times it: `python -m benchmarks.accelerator --help`.

Ends with 1 if a bound was missed, or if none was met.
"""

import argparse
import collections
import dataclasses
import datetime
import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks.accelerator import correctness, speed
from benchmarks.accelerator.rows import MET, MISSED, VERDICTS, Row

SECTIONS = (*correctness.SECTIONS, *speed.SECTIONS)
PACKAGES = ('jax', 'jaxlib', 'optax', 'chex', 'numpy', 'flax')
OF_TORCH = ('torch', 'bitsandbytes')
ON_CPU = 'This is the CPU backend: the script is tried, and no accelerator has been looked at.'


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.accelerator', description=__doc__)
    parser.add_argument('--quick', action='store_true', help='little of each, to try the script')
    parser.add_argument(
        '--output', type=pathlib.Path, default=pathlib.Path('build/accelerator.json')
    )
    parser.add_argument(
        '--sections', nargs='+', choices=SECTIONS, default=SECTIONS, help='a part (all)'
    )
    parser.add_argument(
        '--torch-python',
        default=speed.python_with_torch(),
        help='an interpreter that has torch (this one, if it has)',
    )
    return parser.parse_args(given)


def device_and_cpu() -> tuple[Any, Any]:
    """The first device, and a CPU to compare it with: another one where there are several."""
    try:
        return jax.devices()[0], jax.devices('cpu')[-1]
    except RuntimeError as error:
        raise SystemExit(
            f'JAX finds no CPU to compare with: {error}\nUnset JAX_PLATFORMS, or add cpu to it.'
        ) from error


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """What an interpreter has of some packages."""
    code = 'import json, importlib.metadata as m; '
    code += 'print(json.dumps({d.name: d.version for d in m.distributions()}))'
    found = json.loads(subprocess.run([python, '-c', code], check=True, capture_output=True).stdout)
    return {name: found.get(name, 'not installed') for name in packages}


def about(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """What a table must say about where it comes from."""
    return {
        'date': datetime.date.today().isoformat(),
        'backend': device.platform,
        'device': device.device_kind,
        'devices': jax.device_count(),
        'platform version': getattr(device.client, 'platform_version', '').split('\n')[0],
        'accelerator': device.platform != 'cpu',
        'quick': args.quick,
        'Python': platform.python_version(),
        **versions(sys.executable, PACKAGES),
        **versions(args.torch_python or sys.executable, OF_TORCH),
    }


def rows(args: argparse.Namespace, device: Any, cpu: Any) -> Iterator[Row]:
    checks = correctness.Setup(device, cpu, args.quick)
    timings = speed.Setup(device, args.quick, args.torch_python)
    for section in args.sections:
        if section in correctness.SECTIONS:
            yield from correctness.SECTIONS[section](checks)
        else:
            yield from speed.SECTIONS[section](timings)


def main(given: Sequence[str] | None = None) -> int:
    """Prints the table and writes it as JSON, after every row; returns the exit status."""
    args = arguments(given)
    device, cpu = device_and_cpu()
    if device.platform == 'cpu' and not args.quick:
        print('JAX finds no accelerator. With --quick the script is tried on the CPU.')
        return 2
    result = about(args, device)
    if device.platform == 'cpu':
        print(ON_CPU)
    print(', '.join(f'{name} {value}' for name, value in result.items()))
    left_out = [section for section in SECTIONS if section not in args.sections]
    result |= {'left out': left_out, 'complete': False, 'rows': []}
    print('\n| section | what | measured | bound | verdict |\n|---|---|---|---|---|', flush=True)
    counts: collections.Counter[str] = collections.Counter(dict.fromkeys(VERDICTS, 0))
    start = time.perf_counter()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for row in rows(args, device, cpu):
        print(row, flush=True)
        counts[row.verdict] += 1
        result['rows'].append(dataclasses.asdict(row))
        result |= {'counts': dict(counts), 'seconds': round(time.perf_counter() - start, 1)}
        args.output.write_text(json.dumps(result, indent=1))
    result['complete'] = True
    args.output.write_text(json.dumps(result, indent=1))
    print(f'\n{", ".join(f"{n} {verdict}" for verdict, n in counts.items())}.')
    if left_out:
        print(f'Left out: {", ".join(left_out)}.')
    if device.platform == 'cpu':
        print(ON_CPU)
    print(f'The table is in {args.output} too.')
    return int(counts[MISSED] > 0 or counts[MET] == 0)


if __name__ == '__main__':
    sys.exit(main())
