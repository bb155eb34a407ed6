"""Code shared by the commands of this package."""

import argparse
from typing import NoReturn


def install(extra: str) -> str:
    """How to install an extra of this package, for messages."""
    return f"in a checkout, pip install '.[{extra}]'"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` and exits with code 2."""
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n')
