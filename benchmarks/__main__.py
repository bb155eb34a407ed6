"""Measures the optimizer step and prints a table: `python -m benchmarks --help`."""

import argparse
import datetime
import json
import os
import pathlib
import platform
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from benchmarks import figures, jax_steps, works
from benchmarks.timing import Plan, Spread, interleave, ratios, verdict
from benchmarks.worker import Worker

OURS, BASE, AGAIN = 'rmsprop_jax', 'optax', 'optax again'
TORCH = ('torch single', 'torch foreach', 'torch compiled')
# Beyond this many leaves torch.compile takes minutes.
MOST_COMPILED = 200
COMPILE_TARGET = 0.8


def measure_steps(
    shapes: list[works.Shape], options: dict, plan: Plan, torch: Worker | None
) -> dict[str, Any]:
    """Step times of all contestants on one tree, with compile times and memory of those on JAX."""
    programs = {name: jax_steps.prepare(name, shapes, options) for name in (OURS, BASE, 'keras')}
    remote = {}
    if torch is not None:
        names = TORCH if len(shapes) <= MOST_COMPILED else TORCH[:2]
        remote = {name: torch.prepare(name, shapes, options) for name in names}
    contestants = {**programs, AGAIN: programs[BASE].again(), **remote}
    seconds = interleave(contestants, plan)
    for contestant in remote.values():
        contestant.close()
    return {
        'seconds': seconds,
        'compile': {name: program.seconds for name, program in programs.items()},
        'memory': {name: program.memory for name, program in programs.items()},
    }


def print_steps(rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    names = (OURS, AGAIN, 'keras', *TORCH)
    print('\nTime of a step over that of optax.rmsprop: median [quartiles]\n')
    print('|', ' | '.join(['work', 'form', 'optax', *names, 'target 1.00']), '|')
    print('|---' * (len(names) + 4) + '|')
    for work, variants in rows.items():
        for variant, row in variants.items():
            found = ratios(row['seconds'], BASE)
            milliseconds = Spread.of([1e3 * x for x in row['seconds'][BASE]]).median
            cells = [str(found.get(name, '-')) for name in names]
            reached = verdict(found[OURS], found[AGAIN])
            print('|', ' | '.join([work, variant, f'{milliseconds:.3g} ms', *cells, reached]), '|')
    print('\nPeak memory of a step, arguments included, over that of optax.rmsprop\n')
    for work, variants in rows.items():
        for variant, row in variants.items():
            share = row['memory'][OURS] / row['memory'][BASE]
            keras = row['memory']['keras'] / row['memory'][BASE]
            print(f'- {work}, {variant}: {share:.4f} (keras {keras:.4f})')


def measure_compilation(shapes: list[works.Shape], options: dict, repeats: int) -> list[dict]:
    """Seconds of trace, lower and compile, ours and Optax's in turns."""
    rounds = []
    for turn in range(repeats):
        pair = (OURS, BASE) if turn % 2 else (BASE, OURS)
        rounds.append({n: jax_steps.prepare(n, shapes, options).seconds for n in pair})
    return rounds


def print_compilation(rows: dict[str, list[dict]]) -> None:
    print('\nTrace + lower + compile, seconds (median), and the ratio, round by round\n')
    print('| form | optax | rmsprop_jax | ratio | trace | lower | compile | target 0.80 |')
    print('|---' * 8 + '|')
    for variant, rounds in rows.items():
        total = {n: [sum(r[n].values()) for r in rounds] for n in (OURS, BASE)}
        parts = [
            Spread.of([r[OURS][part] / r[BASE][part] for r in rounds]).median
            for part in ('trace', 'lower', 'compile')
        ]
        ratio = ratios(total, BASE)[OURS]
        cells = [
            variant,
            f'{Spread.of(total[BASE]).median:.2f}',
            f'{Spread.of(total[OURS]).median:.2f}',
            str(ratio),
            *(f'{part:.2f}' for part in parts),
            'met' if ratio.median <= COMPILE_TARGET else 'missed',
        ]
        print('|', ' | '.join(cells), '|')


def measure_init(shapes: list[works.Shape], options: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of an eager `init`."""
    timers = {name: jax_steps.time_to_init(name, shapes, options) for name in (OURS, BASE)}
    for timer in timers.values():
        timer()
    return {
        name: list(times)
        for name, times in zip(
            timers,
            zip(*[[timer() for timer in timers.values()] for _ in range(rounds)], strict=True),
            strict=True,
        )
    }


def print_init(rows: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    print('\nTime of init, and its ratio to that of optax.rmsprop\n')
    for work, variants in rows.items():
        for variant, seconds in variants.items():
            milliseconds = 1e3 * Spread.of(seconds[BASE]).median
            print(f'- {work}, {variant}: {ratios(seconds, BASE)[OURS]} of {milliseconds:.3g} ms')


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
            f'{1e3 * Spread.of(seconds[BASE]).median:.3g} ms',
            str(ratios(seconds, BASE)[OURS]),
            *(f'{share:.0%}' for share in shares),
        ]
        print('|', ' | '.join(cells), '|')


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
    parser.add_argument('--torch-python', help='an interpreter that has torch; without it, none')
    parser.add_argument('--quick', action='store_true', help='tiny trees, to try the harness')
    parser.add_argument('--only', default='', help='rows whose work contains this text')
    parser.add_argument(
        '--sections',
        nargs='+',
        default=['steps', 'compilation', 'init', 'training', 'growth'],
        help='what to measure: %(default)s',
    )
    parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path('build/bench'))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    quick = args.quick
    plan = Plan(placements=2, rounds=2, sample=1e-3) if quick else Plan()
    short = Plan(placements=2, rounds=2, sample=1e-3) if quick else Plan(placements=3, rounds=4)
    trees = {n: s for n, s in works.trees(quick).items() if args.only in n}
    torch = Worker(args.torch_python, 'benchmarks.torch_steps') if args.torch_python else None
    versions = {**jax_steps.versions(), **(torch.ask(do='versions') if torch else {})}
    about = {
        'date': datetime.date.today().isoformat(),
        'python': platform.python_version(),
        'cores': os.cpu_count(),
        'load before': os.getloadavg()[0],
        **versions,
    }
    print(', '.join(f'{name} {value}' for name, value in about.items()), flush=True)
    results: dict[str, Any] = {'about': about}

    if 'steps' in args.sections:
        rows: dict[str, dict[str, Any]] = {}
        for work, shapes in trees.items():
            for variant, options in works.VARIANTS.items():
                row = measure_steps(shapes, options, plan, torch)
                rows.setdefault(work, {})[variant] = row
        results['steps'] = rows
        print_steps(rows)
    if torch is not None:
        torch.close()
    if 'compilation' in args.sections:
        shapes = works.many_leaves(4 if quick else 1000)
        repeats = 2 if quick else 3
        results['compilation'] = {
            variant: measure_compilation(shapes, options, repeats)
            for variant, options in works.VARIANTS.items()
        }
        print_compilation(results['compilation'])
    if 'init' in args.sections:
        results['init'] = {
            work: {
                variant: measure_init(shapes, options, rounds=2 if quick else 7)
                for variant, options in works.VARIANTS.items()
            }
            for work, shapes in trees.items()
        }
        print_init(results['init'])
    if 'training' in args.sections:
        networks = {
            f'MLP {"-".join(map(str, widths))}, batch {batch}': measure_training(
                works.mlp(widths), works.VARIANTS['momentum'], batch, short
            )
            for widths, batch in (
                [((8, 8, 4), 8)]
                if quick
                else [((784, 128, 64, 10), 128), ((784, 2048, 2048, 10), 128)]
            )
        }
        results['training'] = networks
        print_training(networks)
    if 'growth' in args.sections:
        sizes = (10, 100) if quick else (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
        counts = (1, 4) if quick else (1, 10, 100, 1000, 5000)
        growth = {
            'parameters': measure_growth(
                {n: works.one_leaf(n) for n in sizes}, works.VARIANTS['momentum'], short
            ),
            'leaves': measure_growth(
                {n: works.many_leaves(n) for n in counts}, works.VARIANTS['plain'], short
            ),
        }
        results['growth'] = growth
        for what, sized in growth.items():
            print_growth(what, sized)

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'results.json').write_text(json.dumps(results, indent=1))
    figures.draw(results, args.output)
    print(f'\nResults and figures are in {args.output}/.')


if __name__ == '__main__':
    main()
