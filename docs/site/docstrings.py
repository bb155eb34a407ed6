"""Reads our docstrings and our `from module import name as name` as they are meant."""

import re
from typing import Any

import griffe


class Conventions(griffe.Extension):
    """Makes of a docstring what Markdown has for it, and public what a package hands on."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turns `::` before a block into what it means, and names the section of examples."""
        if obj.docstring:
            text = re.sub(r'^( *)::$', r'\1', obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r'::$', ':', text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r'^( *)Example:$', r'\1Examples:', text, flags=re.M)

    def on_alias_instance(self, *, node: Any, alias: griffe.Alias, **_: Any) -> None:
        """Takes `from module import name as name` for what type checkers take it for."""
        names = {name.name for name in getattr(node, 'names', ()) if name.name == name.asname}
        alias.public = alias.name in names
