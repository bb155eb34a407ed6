"""Figures of training runs. The only module of the package that imports matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart. In grey, the dashes help.
COLOURS = ('#000000', '#56B4E9', '#009E73', '#D55E00', '#CC79A7', '#0072B2', '#E69F00')
DASHES = ('-', (0, (5, 1.5)), (0, (1, 1)), '-', (0, (5, 1.5)), (0, (4, 1, 1, 1)), (0, (8, 2)))
STYLE = {'linewidth': 1.8, 'solid_capstyle': 'round'}
LEGEND: dict[str, Any] = {'frameon': False, 'handlelength': 3.2}


def training_figure(records: Sequence[dict[str, Any]], title: str) -> Figure:
    """Plots the loss and accuracy of one run over its steps.

    Args:
      records: One dictionary per epoch, with `step`, `loss`, `train_accuracy` and `test_accuracy`.
      title: The figure's title.

    Example:
      >>> record = {'step': 22, 'loss': 2.1, 'train_accuracy': 0.3, 'test_accuracy': 0.5}
      >>> figure = training_figure([record], 'A short run')
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['training loss', 'accuracy']
    """
    figure, loss_axes, accuracy_axes = _two_panels(title, height=4.2)
    columns = {name: [record[name] for record in records] for name in records[0]}
    loss_axes.plot(columns['step'], columns['loss'], color=COLOURS[5], **STYLE)
    for name, colour, dash in (('train', COLOURS[5], '-'), ('test', COLOURS[3], DASHES[1])):
        values = columns[f'{name}_accuracy']
        label = f'{name} (last: {values[-1]:.1%})'
        accuracy_axes.plot(columns['step'], values, ls=dash, color=colour, label=label, **STYLE)
    accuracy_axes.legend(loc='lower right', frameon=False)
    return figure


def comparison_figure(results: Sequence[dict[str, Any]], title: str) -> Figure:
    """Plots the training loss and test accuracy of several methods, with a band over seeds.

    Args:
      results: One dictionary per method, with its name (`method`), `learning_rate`, `steps`, and
        `loss` and `test_accuracy`, which have one list over steps for each seed.
      title: The figure's title.

    Example:
      >>> result = {'method': 'SGD', 'learning_rate': 1.0, 'steps': [22, 44]}
      >>> result |= {'loss': [[2.0, 1.0], [2.2, 1.2]], 'test_accuracy': [[0.5, 0.8], [0.4, 0.9]]}
      >>> figure = comparison_figure([result], 'One method, two seeds')
      >>> [line.get_ydata().tolist() for line in figure.axes[0].lines]
      [[2.1, 1.1]]
    """
    figure, loss_axes, accuracy_axes = _two_panels(title, height=5.4)
    for result, colour, dash in zip(results, COLOURS, DASHES, strict=False):
        accuracy = np.asarray(result['test_accuracy'])
        label = (
            f'{result["method"]}, learning rate {result["learning_rate"]:g}: '
            f'{accuracy[:, -1].mean():.1%}'
        )
        for axes, values in ((loss_axes, np.asarray(result['loss'])), (accuracy_axes, accuracy)):
            steps, mean = result['steps'], values.mean(axis=0)
            axes.plot(steps, mean, color=colour, ls=dash, label=label, **STYLE)
            low, high = values.min(axis=0), values.max(axis=0)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    accuracy_axes.set_ylabel('test accuracy')
    # The first epochs, near chance, would squeeze the differences that matter.
    accuracy_axes.set_ylim(0.8, 1.005)
    accuracy_axes.yaxis.set_major_locator(MultipleLocator(0.05))
    seeds = len(results[0]['loss'])
    caption = (
        f'Line: mean of {seeds} seeds. Band: smallest to largest of the {seeds}. '
        'Percentages: mean final test accuracy.'
    )
    _add_legend_below(figure, ncols=2, title=caption)
    return figure


# The label and the axis scale for each measurement of `diagnostics.read`.
MEASURES = {
    'step_size': ('step size (unit of the parameter)', 'log'),
    'update_ratio': ('update / parameter', 'log'),
    'epsilon_share': ('epsilon dominates', 'share'),
    'saturated_low': ('at the lower end of the format', 'share'),
    'saturated_high': ('at the upper end of the format', 'share'),
    'stalled': ('stalled', 'share'),
    'nonfinite_gradients': ('non-finite gradient entries', 'count'),
    'nonfinite_updates': ('non-finite update entries', 'count'),
}


def diagnostics_figure(records: Sequence[dict[str, Any]], title: str) -> Figure:
    """Plots an optimizer's measurements over its steps: a panel per kind, a line per group.

    Step sizes are drawn as their median, with a band between the two neighbouring quantiles (by
    default the middle half of the entries). Counts of non-finite entries get a panel only if some
    entries were not finite.

    Args:
      records: One dictionary per measurement, with `step` and the result of `diagnostics.read`.
        Other entries are ignored.
      title: The figure's title.

    Raises:
      ValueError: If there is nothing to draw.

    Example:
      >>> record = {'step': 1, 'step_size/w': [0.1, 0.2, 0.3], 'nonfinite_updates/w': 0}
      >>> figure = diagnostics_figure([record, record | {'step': 2}], 'Two steps')
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['step size (unit of the parameter)']
    """
    columns: dict[str, dict[str, np.ndarray]] = {}
    for key in records[0]:
        measure, _, group = key.partition('/')
        values = np.asarray([record[key] for record in records])
        if measure in MEASURES and (values.any() or not measure.startswith('nonfinite')):
            columns.setdefault(measure, {})[group] = values
    drawn = [measure for measure in MEASURES if measure in columns]
    if not drawn:
        raise ValueError('records must hold measurements from diagnostics.read, but have none.')
    figure = Figure(figsize=(5 * len(drawn), 4.6), dpi=150, layout='constrained')
    figure.suptitle(title, fontsize=13)
    steps = [record['step'] for record in records]
    for axes, measure in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        _draw_measure(axes, measure, steps, columns[measure])
    _add_legend_below(figure, ncols=2 * len(drawn))
    return figure


def _draw_measure(
    axes: Axes, measure: str, steps: Sequence[int], columns: dict[str, np.ndarray]
) -> None:
    label, scale = MEASURES[measure]
    _style(axes, label)
    axes.set_yscale('log' if scale == 'log' else 'linear')
    for i, (group, values) in enumerate(columns.items()):
        look = {'color': COLOURS[i % 7], 'ls': DASHES[(i + i // 7) % 7], **STYLE}
        if measure == 'step_size':
            middle, last = values.shape[1] // 2, values.shape[1] - 1
            low, high = values[:, max(middle - 1, 0)], values[:, min(middle + 1, last)]
            axes.fill_between(steps, low, high, color=look['color'], alpha=0.12, linewidth=0)
            values = values[:, middle]
        axes.plot(steps, values, label=group or 'all', marker='' if steps[1:] else 'o', **look)
    if measure == 'step_size':
        lines = np.concatenate([np.asarray(line.get_ydata()) for line in axes.lines])
        # Without a limit, entries that hardly move would squeeze the others.
        axes.set_ylim(bottom=lines[lines > 0].min(initial=1) / 10)
    if scale == 'share':
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if scale == 'count':
        # This panel has its own legend: its lines are leaves, those of the others are groups.
        axes.legend(**LEGEND)


def _add_legend_below(figure: Figure, ncols: int, title: str | None = None) -> None:
    """A legend below all panels, of the lines of the first."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=ncols, title=title, **LEGEND)


def _two_panels(title: str, height: float) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(10, height), dpi=150, layout='constrained')
    figure.suptitle(title, fontsize=13)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    _style(loss_axes, 'training loss')
    _style(accuracy_axes, 'accuracy')
    loss_axes.set_yscale('log')
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, loss_axes, accuracy_axes


def _style(axes: Axes, label: str) -> None:
    axes.set_xlabel('step')
    axes.set_ylabel(label)
    axes.set_xmargin(0.02)
    axes.grid(color='0.9', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
