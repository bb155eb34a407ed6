"""What the commands of this package share."""

import argparse
from typing import NoReturn


def install(extra: str) -> str:
    """How an extra of this package is installed, for messages."""
    return f"in a checkout, pip install '.[{extra}]'"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` and exits with code 2."""
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n')
