"""Figures of what `python -m benchmarks` measured."""

import pathlib
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from benchmarks.timing import Spread, ratios

STYLES = {
    'optax again': ('tab:gray', 's'),
    'fused': ('tab:green', 'D'),
    'keras': ('tab:red', 'v'),
    'torch single': ('tab:purple', 'x'),
    'torch foreach': ('tab:brown', '+'),
    'torch compiled': ('tab:orange', '^'),
    'rmsprop_jax': ('tab:blue', 'o'),
}


def draw(results: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes steps.png and growth.png where their measurements are."""
    if 'steps' in results:
        _steps(results['steps']).savefig(folder / 'steps.png', dpi=120)
    if 'growth' in results:
        _growth(results['growth']).savefig(folder / 'growth.png', dpi=120)
    plt.close('all')


def _steps(works: dict[str, dict[str, Any]]) -> Any:
    rows = [
        (f'{work}: {variant}', ratios(row['seconds'], 'optax'))
        for work, variants in works.items()
        for variant, row in variants.items()
    ]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.45 * len(rows)), layout='constrained')
    for offset, (name, (colour, marker)) in enumerate(STYLES.items()):
        points = [(i, found[name]) for i, (_, found) in enumerate(rows) if name in found]
        if points:
            axes.errorbar(
                [spread.median for _, spread in points],
                [i + 0.12 * (offset - 3) for i, _ in points],
                xerr=[
                    [spread.median - spread.low for _, spread in points],
                    [spread.high - spread.median for _, spread in points],
                ],
                fmt=marker,
                color=colour,
                label=name,
            )
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set(
        xscale='log',
        xticks=(0.5, 0.7, 1, 1.4, 2, 3, 4, 6),
        yticks=range(len(rows)),
        yticklabels=[label for label, _ in rows],
        xlabel='time of a step over that of optax.rmsprop: median and quartiles',
    )
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_locator(NullLocator())
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=0.3)
    figure.legend(loc='outside upper center', ncols=3)
    return figure


def _growth(growth: dict[str, dict[int, dict[str, list[float]]]]) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    titles = {'parameters': 'one leaf, momentum', 'leaves': 'leaves of 1000, plain'}
    for axes, (what, rows) in zip(panels, growth.items(), strict=True):
        sizes = list(rows)
        for name in ('optax', 'rmsprop_jax'):
            spreads = [Spread.of(rows[size][name]) for size in sizes]
            colour, marker = STYLES.get(name, ('tab:gray', 's'))
            times = [1e3 * spread.median for spread in spreads]
            axes.plot(sizes, times, color=colour, marker=marker, label=name)
        # The last point's line through the origin: steps above it would grow slower than that.
        axes.plot(
            sizes, [times[-1] * size / sizes[-1] for size in sizes], 'k:', label='proportional'
        )
        axes.set(
            xscale='log',
            yscale='log',
            xlabel=f'number of {what}',
            ylabel='milliseconds a step',
            title=titles[what],
        )
        axes.legend()
    return figure
