"""For the reference: the `>>>` lines of docstrings shown as code; without a heading Markdown would take them for quotations."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"(?:^ *>>> .*\n(?: *\S.*\n?)*)", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences each paragraph of a docstring that begins with `>>>`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object after it was read."""
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value)
