"""Measures the optimizer step and prints a table: `python -m benchmarks --help`."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

from benchmarks import figures, jax_steps, works
from benchmarks.timing import Plan, Spread, interleave, ratios, verdict
from benchmarks.worker import Worker

OURS, BASE, AGAIN = 'rmsprop_jax', 'optax', 'optax again'
TORCH = ('torch single', 'torch foreach', 'torch compiled')
# Measured where they are installed: the name of the contestant, and its package.
OPTIONAL = {'fused': 'rmsprop_jax_fused', 'keras': 'keras'}
# Beyond this many leaves torch.compile takes minutes.
MOST_COMPILED = 200
COMPILE_TARGET = 0.8


def measure_steps(shapes: list[works.Shape], options: dict, setup: 'Setup') -> dict[str, Any]:
    """Step times of all contestants on one tree, with the peak memory of those on JAX."""
    names = (OURS, BASE, *setup.installed)
    programs = {name: jax_steps.prepare(name, shapes, options) for name in names}
    remote: dict[str, Any] = {}
    if setup.torch is not None:
        names = TORCH if len(shapes) <= MOST_COMPILED else TORCH[:2]
        remote = {name: setup.torch.prepare(name, shapes, options) for name in names}
    contestants = {**programs, AGAIN: programs[BASE].again(), **remote}
    seconds = interleave(contestants, setup.plan)
    for contestant in remote.values():
        contestant.close()
    memory = {name: program.memory for name, program in programs.items()}
    return {'seconds': seconds, 'memory': memory}


def print_steps(rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    measured = {
        name for variants in rows.values() for row in variants.values() for name in row['seconds']
    }
    names = [name for name in (OURS, AGAIN, *OPTIONAL, *TORCH) if name in measured]
    print('\nTime of a step over that of optax.rmsprop: median [quartiles]\n')
    print_line('work', 'form', 'optax', *names, 'target 1.00')
    print('|---' * (len(names) + 4) + '|')
    for work, variants in rows.items():
        for variant, row in variants.items():
            found = ratios(row['seconds'], BASE)
            cells = [str(found.get(name, '-')) for name in names]
            reached = verdict(found[OURS], found[AGAIN])
            print_line(work, variant, milliseconds(row['seconds'][BASE]), *cells, reached)


def print_memory(rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    print('\nPeak memory of a step, arguments included, over that of optax.rmsprop\n')
    for work, variants in rows.items():
        for variant, row in variants.items():
            others = [f'{n} {x / row["memory"][BASE]:.4f}' for n, x in row['memory'].items()]
            print(f'- {work}, {variant}: {", ".join(others)}')


def print_line(*cells: str) -> None:
    print('|', ' | '.join(cells), '|')


def milliseconds(seconds: Sequence[float]) -> str:
    return f'{1e3 * Spread.of(seconds).median:.3g} ms'


def measure_compilation(
    names: Sequence[str], shapes: list[works.Shape], options: dict, repeats: int
) -> list[dict]:
    """Seconds of trace, lower and compile of each, in turns."""

    def seconds(name: str) -> dict[str, float]:
        # Nobody profits from what was traced before.
        jax.clear_caches()
        return jax_steps.prepare(name, shapes, options).seconds

    return [
        {name: seconds(name) for name in (names if turn % 2 else reversed(names))}
        for turn in range(repeats)
    ]


def print_compilation(rows: dict[str, list[dict]]) -> None:
    print('\nTrace + lower + compile, seconds (median), and their ratios, round by round\n')
    titles = ('form', 'optimizer', 'optax', 'seconds', 'ratio', 'trace', 'lower', 'compile')
    print_line(*titles, 'compile over all of optax', 'target 0.80')
    print('|---' * 10 + '|')
    for variant, rounds in rows.items():
        total = {n: [sum(r[n].values()) for r in rounds] for n in rounds[0]}
        for name, ratio in ratios(total, BASE).items():
            parts = [
                Spread.of([r[name][part] / r[BASE][part] for r in rounds]).median
                for part in jax_steps.PARTS
            ]
            alone = [r[name]['compile'] / sum(r[BASE].values()) for r in rounds]
            cells = [
                variant,
                name,
                f'{Spread.of(total[BASE]).median:.2f}',
                f'{Spread.of(total[name]).median:.2f}',
                str(ratio),
                *(f'{part:.2f}' for part in parts),
                f'{Spread.of(alone).median:.2f}',
                'met' if ratio.median <= COMPILE_TARGET else 'missed',
            ]
            print_line(*cells)


def measure_init(shapes: list[works.Shape], options: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of an eager `init`."""
    timers = {name: jax_steps.time_to_init(name, shapes, options) for name in (OURS, BASE)}
    for timer in timers.values():
        timer()
    turns = [{name: timer() for name, timer in timers.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in timers}


def print_init(rows: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    print('\nTime of init, and its ratio to that of optax.rmsprop\n')
    for work, variants in rows.items():
        for variant, seconds in variants.items():
            ratio = ratios(seconds, BASE)[OURS]
            print(f'- {work}, {variant}: {ratio} of {milliseconds(seconds[BASE])}')


def measure_training(
    shapes: list[works.Shape], options: dict, batch: int, plan: Plan
) -> dict[str, list[float]]:
    """Seconds of a training step with ours, with Optax's, and of its gradient only."""
    return interleave(
        {
            name or 'gradient': jax_steps.train_step(name, shapes, options, batch)
            for name in (OURS, BASE, None)
        },
        plan,
    )


def print_training(rows: dict[str, dict[str, list[float]]]) -> None:
    print("\nA whole training step (momentum), and the optimizer's share of it\n")
    print('| network | optax | rmsprop_jax / optax | share of optax | share of rmsprop_jax |')
    print('|---' * 5 + '|')
    for network, seconds in rows.items():
        shares = [
            1
            - Spread.of(
                [g / x for g, x in zip(seconds['gradient'], seconds[name], strict=True)]
            ).median
            for name in (BASE, OURS)
        ]
        cells = [
            network,
            milliseconds(seconds[BASE]),
            str(ratios(seconds, BASE)[OURS]),
            *(f'{share:.0%}' for share in shares),
        ]
        print_line(*cells)


def measure_growth(works_: dict[int, list[works.Shape]], options: dict, plan: Plan) -> dict:
    """Seconds of a step of ours and of Optax's, by size."""
    return {
        size: interleave(
            {n: jax_steps.prepare(n, shapes, options) for n in (OURS, BASE)},
            plan,
        )
        for size, shapes in works_.items()
    }


def print_growth(what: str, rows: dict[int, dict[str, list[float]]]) -> None:
    print(f'\nGrowth with the number of {what}: milliseconds a step, and nanoseconds each\n')
    for size, seconds in rows.items():
        times = {name: Spread.of(values).median for name, values in seconds.items()}
        cells = [f'{n} {1e3 * t:.4g} ms ({1e9 * t / size:.3g} ns)' for n, t in times.items()]
        print(f'- {size}: {", ".join(cells)}')


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the sections measure, and how much.

    Attributes:
      trees: The rows of the tables.
      plan: For the time of a step.
      short: For training steps and growth.
      torch: The process that has PyTorch, if there is one.
      installed: Those of `OPTIONAL` that are installed.
      quick: Whether only the harness is tried.
    """

    trees: dict[str, list[works.Shape]]
    plan: Plan
    short: Plan
    torch: Worker | None
    installed: tuple[str, ...]
    quick: bool


def steps(setup: Setup) -> dict[str, Any]:
    rows = {
        work: {
            variant: measure_steps(shapes, options, setup)
            for variant, options in works.VARIANTS.items()
        }
        for work, shapes in setup.trees.items()
    }
    print_steps(rows)
    print_memory(rows)
    return rows


def compilation(setup: Setup) -> dict[str, Any]:
    shapes = works.many_leaves(4 if setup.quick else 1000)
    names = (OURS, BASE, *(name for name in setup.installed if name == 'fused'))
    rows = {
        variant: measure_compilation(names, shapes, options, repeats=2 if setup.quick else 5)
        for variant, options in works.VARIANTS.items()
    }
    print_compilation(rows)
    return rows


def init(setup: Setup) -> dict[str, Any]:
    rows = {
        work: {
            variant: measure_init(shapes, options, rounds=2 if setup.quick else 7)
            for variant, options in works.VARIANTS.items()
        }
        for work, shapes in setup.trees.items()
    }
    print_init(rows)
    return rows


def training(setup: Setup) -> dict[str, Any]:
    networks = [((784, 128, 64, 10), 128), ((784, 2048, 2048, 10), 128)]
    rows = {
        f'MLP {"-".join(map(str, widths))}, batch {batch}': measure_training(
            works.mlp(widths), works.VARIANTS['momentum'], batch, setup.short
        )
        for widths, batch in ([((8, 8, 4), 8)] if setup.quick else networks)
    }
    print_training(rows)
    return rows


def growth(setup: Setup) -> dict[str, Any]:
    sizes = (10, 100) if setup.quick else (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
    counts = (1, 4) if setup.quick else (1, 10, 100, 1000, 5000)
    leaves = {n: works.one_leaf(n) for n in sizes}
    trees = {n: works.many_leaves(n) for n in counts}
    rows = {
        'parameters': measure_growth(leaves, works.VARIANTS['momentum'], setup.short),
        'leaves': measure_growth(trees, works.VARIANTS['plain'], setup.short),
    }
    for what, sized in rows.items():
        print_growth(what, sized)
    return rows


SECTIONS = {section.__name__: section for section in (steps, compilation, init, training, growth)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
    parser.add_argument('--torch-python', help='an interpreter that has torch; without it, none')
    parser.add_argument('--quick', action='store_true', help='tiny trees, to try the harness')
    parser.add_argument('--only', default='', help='rows whose work contains this text')
    parser.add_argument(
        '--sections',
        nargs='+',
        choices=SECTIONS,
        default=list(SECTIONS),
        help='what to measure (all)',
    )
    parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path('build/bench'))
    return parser.parse_args()


def versions(setup: Setup) -> dict[str, Any]:
    """What a table must say about where it comes from."""
    packages = ('jax', 'optax', *(OPTIONAL[name] for name in setup.installed))
    return {
        'date': datetime.date.today().isoformat(),
        'Python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        **(setup.torch.ask(do='versions') if setup.torch else {}),
        'cores': os.cpu_count(),
        'load before': round(os.getloadavg()[0], 1),
    }


def main() -> None:
    args = arguments()
    tiny = Plan(placements=2, rounds=2, sample=1e-3)
    setup = Setup(
        trees={name: s for name, s in works.trees(args.quick).items() if args.only in name},
        plan=tiny if args.quick else Plan(),
        short=tiny if args.quick else Plan(placements=3, rounds=4),
        torch=Worker(args.torch_python, 'benchmarks.torch_steps') if args.torch_python else None,
        installed=tuple(n for n, package in OPTIONAL.items() if importlib.util.find_spec(package)),
        quick=args.quick,
    )
    results: dict[str, Any] = {'versions': versions(setup)}
    print(', '.join(f'{name} {value}' for name, value in results['versions'].items()), flush=True)
    for section in args.sections:
        results[section] = SECTIONS[section](setup)
    if setup.torch is not None:
        setup.torch.close()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'results.json').write_text(json.dumps(results, indent=1))
    figures.draw(results, args.output)
    print(f'\nResults and figures are in {args.output}/.')


if __name__ == '__main__':
    main()
