"""Contestants that live in another process, where another environment's packages are.

The process obeys one JSON object a line on its standard input, and answers each with one line.
"""

import importlib
import json
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent


class Worker:
    """A Python process that holds contestants made by `module.prepare`."""

    def __init__(self, python: str, module: str) -> None:
        self._process = subprocess.Popen(
            [python, '-m', 'benchmarks.worker', module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f'the process with {request} ended: {self._process.wait()}')
        answer = json.loads(line)
        if 'error' in answer:
            raise RuntimeError(answer['error'])
        return answer['answer']

    def prepare(self, name: str, shapes: list, options: dict) -> 'Remote':
        self.ask(do='prepare', name=name, shapes=shapes, options=options)
        return Remote(self, name)

    def close(self) -> None:
        self._process.communicate()


class Remote:
    """The near end of a contestant in a `Worker`."""

    def __init__(self, worker: Worker, name: str) -> None:
        self._worker, self._name = worker, name

    def place(self) -> None:
        self._worker.ask(do='place', name=self._name)

    def run(self, steps: int) -> float:
        return self._worker.ask(do='run', name=self._name, steps=steps)

    def close(self) -> None:
        self._worker.ask(do='drop', name=self._name)


def serve(module: Any) -> None:
    """Obeys requests until standard input ends."""
    contestants: dict[str, Any] = {}
    answers, sys.stdout = sys.stdout, sys.stderr

    def obey(do: str, name: str = '', shapes: Any = (), options: Any = None, steps: int = 0) -> Any:
        if do == 'versions':
            return module.versions()
        if do == 'prepare':
            contestants[name] = module.prepare(name, [tuple(s) for s in shapes], options)
            return None
        if do == 'drop':
            return contestants.pop(name) and None
        contestant = contestants[name]
        return contestant.run(steps) if do == 'run' else contestant.place()

    for line in sys.stdin:
        try:
            reply = {'answer': obey(**json.loads(line))}
        except Exception as error:
            reply = {'error': f'{type(error).__name__}: {error}'}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == '__main__':
    serve(importlib.import_module(sys.argv[1]))
