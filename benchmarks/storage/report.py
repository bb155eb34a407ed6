"""Prints the study's tables in Markdown and draws its figures from the records of its parts.

::

    python -m benchmarks.storage.report build/storage-study
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.storage.training import SEEDS
from rmsprop_jax.plots import COLOURS

Record = dict[str, Any]
TASKS = {
    'digits': 'digits, decay 0.99',
    'language, MLP': 'characters, MLP, decay 0.999',
    'language': 'characters, transformer, decay 0.999',
}


def percent(value: float) -> str:
    """A share or a relative error, in two digits."""
    return f'{100 * value:.2g} %' if abs(value) < 10 else f'{100 * value:.1e} %'


def bias(record: Record) -> str:
    digits = 3 if record['bias_se'] < 1e-3 else 1
    if abs(record['bias']) > 10:
        return percent(record['bias'])
    return f'{100 * record["bias"]:+.{digits}f} ± {100 * record["bias_se"]:.{digits}f} %'


def times(value: float) -> str:
    return f'{value:.3g}'


def pooled(records: Iterable[Record], keys: Sequence[str]) -> list[Record]:
    """One record for all seeds: the largest of the worst steps, the mean of everything else."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    merged = []
    for values, group in groups.items():
        record = dict(zip(keys, values, strict=True))
        for name in group[0].keys() - keys - {'seed'}:
            found = [one[name] for one in group]
            extreme = name.startswith('worst') or name == 'max'
            record[name] = max(found) if extreme else float(np.mean(found))
        if 'bias_se' in record:
            record['bias_se'] /= len(group) ** 0.5
        merged.append(record)
    return merged


def table(records: Iterable[Record], columns: dict[str, str | Callable[[Record], str]]) -> str:
    """A Markdown table; a column is a key or a function of the record."""
    lines = ['| ' + ' | '.join(columns) + ' |', '|' + ' --- |' * len(columns)]
    for record in records:
        cells = [str(record[c]) if isinstance(c, str) else c(record) for c in columns.values()]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def tracking_tables(tables: dict[str, list[Record]]) -> Iterable[str]:
    errors: dict[str, str | Callable[[Record], str]] = {
        'median': lambda r: percent(r['median']),
        '99th percentile': lambda r: percent(r['p99']),
    }
    worst: dict[str, str | Callable[[Record], str]] = {
        'largest step': lambda r: times(r['worst']),
        'of those over 1': lambda r: times(r['worst_large']),
    }
    mean: dict[str, str | Callable[[Record], str]] = {'mean of moment': bias}
    ends: dict[str, str | Callable[[Record], str]] = {
        'at the ends': lambda r: percent(r['saturated'])
    }
    compact = {
        name: [r for r in found if r['format'] != 'float32'] for name, found in tables.items()
    }
    first = {'format': 'format', 'decay': 'decay'}
    records = pooled(compact['second moment'], ['format', 'decay'])
    records.sort(key=lambda r: (r['format'], r['decay']))
    yield '### Second moment\n\n' + table(records, first | errors | mean | worst | ends)
    records = pooled(compact['gradient dtype'], ['format', 'dtype'])
    first = {'format': 'format', 'gradients': 'dtype'}
    yield '### Narrow gradients\n\n' + table(records, first | errors | mean | worst | ends)
    records = pooled(tables['mean and trace'], ['format', 'decay'])
    records.sort(key=lambda r: (r['format'], r['decay']))
    first = {'statistic': 'format', 'decay': 'decay'}
    yield '### Mean and trace\n\n' + table(records, first | errors | {'gain': bias})
    records = pooled(compact['centered'], ['format', 'mean'])
    records.sort(key=lambda r: (r['format'], r['mean']))
    first = {'format': 'format', 'mean': lambda r: f'{r["mean"]:g}'}
    low: dict[str, Any] = {'lowest 0.1 %': lambda r: times(r['low'])}
    yield '### Centered\n\n' + table(records, first | errors | mean | low | worst)


def difference_columns(series: str = '') -> dict[str, str | Callable[[Record], str]]:
    """The difference of a training to the one it is paired with, in a series of seeds."""

    def difference(r: Record) -> str:
        mean, error = r.get(f'{series}difference'), r.get(f'{series}se')
        return '' if error is None else f'{mean:+.4f} ± {error:.4f}'

    def ratio(r: Record) -> str:
        mean, error = r.get(f'{series}difference'), r.get(f'{series}se')
        return '' if error is None else f'{mean / error:+.1f}'

    name = series.replace('_', ' ')
    return {f'{name}difference': difference, f'{name}in standard errors': ratio}


LOSSES: dict[str, str | Callable[[Record], str]] = {
    'loss': lambda r: f'{np.mean(r["losses"]):.4f}',
    **difference_columns(),
}


def training_table(records: list[Record]) -> str:
    columns = {'model': 'task', 'optimizer': 'family', 'format': 'format'}
    return '### Training\n\n' + table(records, columns | LOSSES)


def parameters_table(records: list[Record]) -> str:
    columns = {'model': 'task', 'parameters': 'format', 'bytes a parameter': 'bytes'}
    columns |= LOSSES | difference_columns('second_')
    return '### Parameters in bfloat16\n\n' + table(records, columns)


def steps_table(records: list[Record]) -> str:
    columns: dict[str, str | Callable[[Record], str]] = {
        'gradients': 'stream',
        'decay': 'decay',
        'format': 'format',
        'median': lambda r: percent(r['median']),
        '99th percentile': lambda r: percent(r['p99']),
        'mean': lambda r: times(r['mean']),
        'largest step': lambda r: times(r['worst']),
        'of those over 1': lambda r: times(r['worst_large']),
    }
    records = sorted(records, key=lambda r: (r['stream'] != 'synthetic', r['stream'], r['decay']))
    return '### Steps beside bitsandbytes\n\n' + table(records, columns)


def cost_table(records: list[Record]) -> str:
    columns: dict[str, str | Callable[[Record], str]] = {
        'format': 'format',
        'bytes a parameter': lambda r: f'{r["bytes"]:.3g}',
        'time': lambda r: f'{r["ratio"]:.2f} ({r["from"]:.2f} to {r["to"]:.2f})',
    }
    return '### Time on a CPU\n\n' + table(records, columns)


def panels(width: float, height: float, count: int, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=120, layout='constrained')
    axes = list(figure.subplots(1, count, squeeze=False, **options)[0])
    for one in axes:
        one.grid(color='0.9', linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[['top', 'right']].set_visible(False)
    return figure, axes


def window_figure(records: list[Record]) -> Figure:
    """Saturation and worst steps of uint8 over the size of the gradients."""
    figure, (share, root, worst) = panels(11, 3.6, 3, sharex=True)
    formats = list(dict.fromkeys(record['format'] for record in records))
    for format, colour, line in zip(formats, COLOURS[3:], ('-', '--', ':'), strict=False):
        rows = [record for record in records if record['format'] == format]
        sizes = [record['size'] for record in rows]
        style = {'color': colour, 'ls': line, 'label': format, 'linewidth': 1.8}
        share.plot(sizes, [record['saturated'] for record in rows], **style)
        root.plot(sizes, [record['root_ratio'] for record in rows], **style)
        worst.plot(sizes, [record['worst'] for record in rows], **style)
    share.set_ylabel('share of entries at an end')
    root.set_ylabel('stored root / true root, median')
    worst.set_ylabel('largest step / its float32 size')
    for axes in (share, root, worst):
        axes.set_xscale('log')
        axes.set_xlabel('median size of the gradients')
    for axes in (root, worst):
        axes.set_yscale('log')
        axes.axhline(1, color='0.5', linewidth=0.8)
    figure.suptitle('The window of storage.uint8')
    figure.legend(*share.get_legend_handles_labels(), loc='outside lower center', ncols=3)
    return figure


def training_figure(records: list[Record]) -> Figure:
    """Paired differences to float32, with their standard errors; a second series is hollow."""
    records = [record for record in records if 'difference' in record]
    tasks = [task for task in TASKS if any(record['task'] == task for record in records)]
    figure, axes = panels(11, 4, len(tasks), sharey=True)
    for one, task in zip(axes, tasks, strict=True):
        rows = [record for record in records if record['task'] == task][::-1]
        for place, row in enumerate(rows):
            colour = '0.5' if 'float32, ' in row['format'] else COLOURS[5]
            style: dict[str, Any] = {'color': colour, 'capsize': 4, 'fmt': 'o'}
            apart = 0.15 if 'second_se' in row else 0
            one.errorbar(row['difference'], place + apart, xerr=row['se'], **style)
            if apart:
                style |= {'xerr': row['second_se'], 'markerfacecolor': 'white'}
                one.errorbar(row['second_difference'], place - apart, **style)
        labels = [
            row['format']
            if row.get('family', 'plain') == 'plain'
            else f'{row["family"]}: {row["format"]}'
            for row in rows
        ]
        one.set_yticks(range(len(rows)), labels)
        one.axvline(0, color='0.5', linewidth=0.8)
        one.locator_params(axis='x', nbins=5)
        one.set_title(TASKS[task], fontsize=10)
    figure.supxlabel('held-out loss less that of float32, nats', fontsize=10)
    hollow = ' (hollow: other seeds)' if any('second_se' in row for row in records) else ''
    figure.suptitle(f'Mean of {SEEDS} paired differences{hollow}, with one standard error')
    return figure


def steps_figure(records: list[Record]) -> Figure:
    """Errors of steps: median, 99th percentile and the largest."""
    cases = sorted(
        {(record['stream'], record['decay']) for record in records},
        key=lambda case: (case[0] != 'synthetic', *case),
    )
    figure, axes = panels(11, 4, len(cases), sharey=True)
    names = list(dict.fromkeys(record['format'] for record in records))[::-1]
    for one, (stream, decay) in zip(axes, cases, strict=True):
        for place, name in enumerate(names):
            (row,) = (
                r
                for r in records
                if (r['stream'], r['decay'], r['format']) == (stream, decay, name)
            )
            one.plot([row['median'], row['p99']], [place] * 2, '-', color=COLOURS[5], linewidth=2)
            one.plot(row['median'], place, 'o', color=COLOURS[5])
            one.plot(row['p99'], place, '|', color=COLOURS[5], markersize=12, markeredgewidth=2)
            one.plot(row['worst'] - 1, place, 'x', color=COLOURS[3])
        one.set_xscale('log')
        one.set_yticks(range(len(names)), names)
        one.set_title(f'{stream}, {decay}', fontsize=10)
    figure.suptitle(
        'Relative error of steps: median (dot), 99th percentile (bar), largest step (x)'
    )
    return figure


def main(folder: Path) -> None:
    def load(name: str) -> Any:
        return json.loads((folder / name).read_text())

    tracking, training = load('tracking.json'), load('training.json')
    steps = load('steps-ours.json') + load('steps-peer.json')
    parameters = load('parameters.json')
    tables = [*tracking_tables(tracking), training_table(training), steps_table(steps)]
    tables.append(parameters_table(parameters))
    text = '\n\n'.join([*tables, cost_table(load('cost.json'))]) + '\n'
    (folder / 'tables.md').write_text(text)
    print(text)
    figures = {
        'window': window_figure(tracking['window']),
        'training': training_figure(training),
        'parameters': training_figure(parameters),
        'steps': steps_figure(steps),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f'storage-{name}.png')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
