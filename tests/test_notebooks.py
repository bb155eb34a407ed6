"""The notebooks are pairs with their sources, and what they print is the same on every machine."""

import json
import re
import shutil

import notebook_pairs
import pytest
from notebook_pairs import NOTEBOOKS

PATHS = sorted(NOTEBOOKS.glob('*.ipynb'))
MEGABYTE = 1024**2


def test_each_is_in_step_with_its_source():
    assert len(PATHS) == 8
    assert list(notebook_pairs.out_of_step(NOTEBOOKS)) == []


def test_a_pair_that_is_out_of_step_is_named(tmp_path):
    shutil.copytree(NOTEBOOKS, tmp_path / 'notebooks')
    folder = tmp_path / 'notebooks'
    changed, longer, alone, lost = (path.stem for path in PATHS[:4])
    notebook = notebook_pairs.read(folder / f'{changed}.ipynb')
    notebook.cells[2].source += '\n\nA sentence.'
    # Outputs are not compared.
    notebook.cells[1].outputs = []
    (folder / f'{changed}.ipynb').write_text(json.dumps(notebook))
    with (folder / 'sources' / f'{longer}.py').open('a') as text:
        text.write('\n# %%\nprint(1)\n')
    (folder / f'{alone}.ipynb').unlink()
    (folder / 'sources' / f'{lost}.py').unlink()
    cells = len(notebook_pairs.read(folder / f'{longer}.ipynb').cells)
    assert list(notebook_pairs.out_of_step(folder)) == [
        f'{alone} has no notebook',
        f'{lost} has no source',
        f'{changed}: cell 3 differs',
        f'{longer}: {cells + 1} cells in the source, {cells} in the notebook',
    ]


def test_all_together_are_small():
    assert sum(path.stat().st_size for path in PATHS) < 4 * MEGABYTE


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_begins_with_what_one_learns_and_how_long_it_takes(self, path):
        first = notebook_pairs.read(path).cells[0].source.replace('\n', ' ')
        assert re.match(
            r'# [^#]*?  \*\*You will learn\*\* .+\. \*\*It takes\*\* \d+ minutes to read and '
            r'(\d+ seconds|a minute|\d+ minutes) to run on two CPU cores\.  ',
            first,
        )

    def test_it_was_run_once_from_top_to_bottom(self, path):
        code = [c for c in notebook_pairs.read(path).cells if c.cell_type == 'code']
        assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
        outputs = [output for c in code for output in c.outputs]
        assert {o.output_type for o in outputs} <= {'stream', 'display_data', 'execute_result'}
        # Warnings come on the other stream.
        assert {o.name for o in outputs if o.output_type == 'stream'} == {'stdout'}
        assert all(o.output_type != 'display_data' or 'image/png' in o.data for o in outputs)

    def test_nothing_in_it_depends_on_the_machine_or_is_wide(self, path):
        notebook = notebook_pairs.read(path)
        assert notebook.metadata == notebook_pairs.METADATA
        assert not any(cell.metadata or 'id' in cell for cell in notebook.cells)
        code = [c for c in notebook.cells if c.cell_type == 'code']
        shown = [
            output.get('text', '') + output.get('data', {}).get('text/plain', '')
            for cell in code
            for output in cell.outputs
        ]
        # As wide as code may be on the site.
        assert max(len(line) for text in shown for line in text.splitlines()) <= 100
        assert not re.search(
            r'(^|[\s\'"])(/\w|[A-Z]:\\)|site-packages|0x[0-9a-f]{6}', ' '.join(shown)
        )
