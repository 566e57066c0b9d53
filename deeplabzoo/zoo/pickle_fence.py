"""What every pickle is held to before and while anything reads it: plain instructions, and no more copies than bytes.

A pickle is a program. Some of its instructions reach outside the file, and a few bytes can make its reader take any amount of
memory: a place in a list of notes that is far away, or one long value copied again and again.
"""

import pickle
import pickletools
from collections.abc import Callable, Collection, Sequence, Sized
from typing import Any

FOREIGN = frozenset({"PERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER"})
"""Instructions that reach outside the file or make objects in ways that neither arrays nor tensors are written in."""
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}


def require_plain(data: bytes, foreign: Collection[str] = FOREIGN) -> None:
    """Raise UnpicklingError for a pickle with a foreign instruction, or one that notes a value at a place far away.

    Lengths that exceed the data fail here too, before memory is taken for them.
    """
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data), start=1):
        is_far = instruction.name in _MEMO and isinstance(argument, int) and argument > count
        if instruction.name in foreign or is_far:
            raise pickle.UnpicklingError(f"{instruction.name} does not occur in a pickle of arrays.")


class Copies:
    """How many elements may still be copied while one pickle is read: about as many as it has bytes, as each takes one."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def spend(self, copied: object) -> None:
        """Count a value that is about to be copied; raises UnpicklingError where it is one too many."""
        self._left -= 1 + (len(copied) if isinstance(copied, Sized) else 0)
        if self._left < 0:
            raise pickle.UnpicklingError("It copies more than it holds.")

    def counted(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return `make`, which copies a list, a text or a dictionary, counting what it copies; a bare number is refused."""

        def made(*arguments: Any) -> Any:
            for one in arguments:
                if not isinstance(one, Sequence | dict | set):
                    raise pickle.UnpicklingError("It makes something out of nothing.")
                self.spend(one)
            return make(*arguments)

        return made
