"""Installs a wheel into empty environments, and checks there that it works.

    python install.py WHEEL FOLDER INTERPRETER...

For each interpreter there are two environments in the folder: with the newest dependencies, and
with the oldest that the wheel says it can do with. In each the wheel is first alone, then with
Flax.
"""

import re
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

CHECK = Path(__file__).with_name('check.py')
INSTALL = ('-m', 'pip', 'install', '--quiet', '--disable-pip-version-check')


def oldest(wheel: Path) -> list[str]:
    """The lower bounds of a wheel's dependencies and of its extra for Flax, as exact versions."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        metadata = BytesParser().parsebytes(archive.read(name))
    wanted = metadata.get_all('Requires-Dist', [])
    core = [x for x in wanted if 'extra ==' not in x or re.search(r"extra == '?\"?flax", x)]
    found = [re.match(r'([\w-]+)>=([\w.]+)', x.replace(' ', '')) for x in core]
    pins = [f'{match[1]}=={match[2]}' for match in found if match]
    assert len(pins) == len(core) >= 5, f'not every dependency has a lower bound: {core}'
    return pins


def check(python: Path, wheel: Path, constraints: Path) -> None:
    """Installs the wheel, alone and with Flax, under constraints, and looks at it."""
    for extra in ('', 'flax'):
        what = f'{wheel}[{extra}]' if extra else str(wheel)
        run(python, *INSTALL, '--constraint', str(constraints), what)
        run(python, '-m', 'pip', '--disable-pip-version-check', 'check')
        # Isolated, so that neither this folder nor PYTHONPATH can stand in for what is missing.
        run(python, '-I', str(CHECK), *[extra] * bool(extra))


def run(*command: object) -> None:
    subprocess.run([str(x) for x in command], check=True, cwd=CHECK.parent)


def main(wheel: Path, folder: Path, interpreters: list[str]) -> None:
    for interpreter in interpreters:
        for age, pins in (('newest', []), ('oldest', oldest(wheel))):
            environment = folder / f'{Path(interpreter).name}-{age}'
            print(f'== {environment.name}: {" ".join(pins) or "the newest dependencies"}')
            run(interpreter, '-m', 'venv', '--clear', environment)
            constraints = environment / 'constraints.txt'
            constraints.write_text('\n'.join(pins))
            check(environment / 'bin' / 'python', wheel, constraints)


if __name__ == '__main__':
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3:])
