"""The measuring harness: its arithmetic, and one short run of every part."""

import json
import subprocess
import sys

import pytest

from benchmarks import jax_steps, works
from benchmarks.timing import Plan, Spread, interleave, ratios, verdict
from benchmarks.worker import ROOT, Worker

pytestmark = pytest.mark.extended


class Clockwork:
    """A contestant that takes the time it is told."""

    def __init__(self, times):
        self.times = iter(times)
        self.placed = 0

    def place(self):
        self.placed += 1

    def run(self, steps):
        return steps * next(self.times)


def test_rounds_are_paired_and_buffers_placed_anew():
    plan = Plan(placements=2, rounds=3, sample=0.0)
    # Two warm-up runs open each placement; the machine slows down tenfold in the second.
    one = [9.0, 9.0, 1.0, 2.0, 3.0]
    base = Clockwork([*one, *(10 * x for x in one)])
    ours = Clockwork([*(x / 2 for x in one), *(5 * x for x in one)])
    seconds = interleave({'ours': ours, 'base': base}, plan)
    assert base.placed == ours.placed == 2
    assert seconds['base'] == [1.0, 2.0, 3.0, 10.0, 20.0, 30.0]
    assert ratios(seconds, 'base') == {'ours': Spread(0.5, 0.5, 0.5)}


def test_spread_and_verdict():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    floor = Spread(1.0, 0.95, 1.05)
    assert verdict(Spread(0.99, 0.9, 1.3), floor) == 'met'
    assert verdict(Spread(1.04, 1.02, 1.3), floor) == 'within noise'
    assert verdict(Spread(1.2, 1.1, 1.3), floor) == 'missed'


def test_trees_are_as_large_as_named():
    trees = works.trees()
    assert works.size(trees['one leaf of 32M']) == 2**25
    assert len(trees['ResNet-50-like']) == 159
    # torchvision's resnet50 has 25557032 parameters, its classifier 2049000 of them.
    assert works.size(trees['ResNet-50-like']) == 25557032 - 2049000
    assert len(trees['1000 leaves of 1000']) == 1000
    assert len(trees['small MLP']) == 6


@pytest.mark.parametrize('variant', works.VARIANTS)
def test_contestants_take_the_step_they_are_named_after(variant):
    shapes = works.mlp((3, 2))
    ours, base = (
        jax_steps.prepare(name, shapes, works.VARIANTS[variant])
        for name in ('rmsprop_jax', 'optax')
    )
    assert ours.seconds.keys() == {'trace', 'lower', 'compile'}
    for contestant in (ours, base):
        contestant.place()
        assert contestant.run(2) > 0
    for x, y in zip(ours.params, base.params, strict=True):
        assert abs(x - y).max() < 1e-5
        assert abs(x).max() > 0


def test_a_worker_answers_and_says_what_went_wrong():
    worker = Worker(sys.executable, 'benchmarks.jax_steps')
    contestant = worker.prepare('optax', works.mlp((3, 2)), {})
    contestant.place()
    assert contestant.run(1) > 0
    with pytest.raises(RuntimeError, match='unknown'):
        worker.prepare('unknown', [(3,)], {})
    contestant.close()
    with pytest.raises(RuntimeError, match='KeyError'):
        contestant.run(1)
    worker.close()


def test_the_command_prints_every_section_and_draws(tmp_path):
    command = [sys.executable, '-m', 'benchmarks', '--quick', '--output', str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for title in ('Time of a step', 'Peak memory', 'Trace + lower', 'init', 'training', 'Growth'):
        assert title in done.stdout
    results = json.loads((tmp_path / 'results.json').read_text())
    assert {'versions', 'steps', 'compilation', 'init', 'training', 'growth'} == results.keys()
    assert (tmp_path / 'steps.png').stat().st_size > 10_000
    assert (tmp_path / 'growth.png').stat().st_size > 10_000
