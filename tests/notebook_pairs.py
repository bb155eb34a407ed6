"""The notebooks of notebooks/ and the texts of notebooks/sources/, which are pairs.

`python tests/notebook_pairs.py check` says which pairs are out of step, cell by cell; outputs are
not compared. `python tests/notebook_pairs.py write FOLDER` copies the executed notebooks of a
folder to notebooks/, without what changes from run to run: times, cell ids, versions.
"""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jupytext
import nbformat

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'notebooks'
# Jupyter asks for a kernel without the first; GitHub does not colour the code without the second.
METADATA = {
    'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
    'language_info': {'name': 'python'},
}


def out_of_step(folder: pathlib.Path) -> Iterator[str]:
    """What differs between the notebooks of a folder and their sources."""
    texts = {path.stem: path for path in folder.glob('sources/*.py')}
    notebooks = {path.stem: path for path in folder.glob('*.ipynb')}
    for name in sorted(texts.keys() ^ notebooks.keys()):
        yield f'{name} has no {"notebook" if name in texts else "source"}'
    for name in sorted(texts.keys() & notebooks.keys()):
        ours, theirs = cells(jupytext.read(texts[name])), cells(read(notebooks[name]))
        if len(ours) != len(theirs):
            yield f'{name}: {len(ours)} cells in the source, {len(theirs)} in the notebook'
        pairs = enumerate(zip(ours, theirs, strict=False), start=1)
        yield from (f'{name}: cell {number} differs' for number, (a, b) in pairs if a != b)


def read(path: pathlib.Path) -> Any:
    """A notebook."""
    return nbformat.read(path, as_version=4)


def cells(notebook: Any) -> list[tuple[str, str]]:
    """The kind and the text of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def stripped(notebook: Any) -> Any:
    """An executed notebook, without what changes from run to run though nothing else does."""
    # Cells have random ids from 4.5 on.
    notebook.metadata, notebook.nbformat_minor = METADATA, 4
    for cell in notebook.cells:
        cell.pop('id', None)
        cell.metadata = {}
        if cell.cell_type == 'code':
            cell.outputs = [o for o in joined(cell.outputs) if not is_address(o)]
    return notebook


def is_address(output: Any) -> bool:
    """Whether an output is the last value of a cell that nobody wanted to see."""
    text = output.get('data', {}).get('text/plain', '')
    return output.output_type == 'execute_result' and ' at 0x' in text


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs with what was printed in one piece: the kernel sends it in pieces of any length."""
    result: list[Any] = []
    for output in outputs:
        before = result[-1] if result else None
        if before and output.output_type == 'stream' and before.get('name') == output.name:
            before.text += output.text
        else:
            result.append(output)
    return result


def main(command: str, *folder: str) -> int:
    """Writes the notebooks or looks at them; 1 if they are not pairs with their sources."""
    if command == 'write':
        for path in sorted(pathlib.Path(*folder).glob('*.ipynb')):
            nbformat.write(stripped(read(path)), NOTEBOOKS / path.name)
    differences = list(out_of_step(NOTEBOOKS))
    for line in differences:
        print(f'{line}: make notebooks-write brings them into step', file=sys.stderr)
    return int(bool(differences))


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
