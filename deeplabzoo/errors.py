"""The errors that deeplabzoo raises on purpose: each message is one sentence that says what, what was expected, what to do.

A command prints the sentence on stderr and leaves with `exit_status`: 1 where the work failed, 2 where the call was wrong.
"""

import difflib
from collections.abc import Iterable

_MAX_MESSAGE_LENGTH = 1500
"""Characters of a message; the longest list of names that one holds has some 900."""


def printable(text: str) -> str:
    r"""Return text that a terminal shows as it is: what would move its cursor, hide or reorder letters is written as an escape.

    Names out of files and archives, which anybody may have chosen, stand in messages.

    >>> printable("cat\x1b[2J")
    'cat\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


class DeepLabZooError(Exception):
    """Base of every error raised on purpose; the work could not be done.

    Its message is one printable line, whatever names and values were put into it; a very long one loses its middle.
    """

    exit_status = 1

    def __init__(self, sentence: str) -> None:
        line = printable(sentence)
        half = _MAX_MESSAGE_LENGTH // 2
        super().__init__(line if len(line) <= _MAX_MESSAGE_LENGTH else f"{line[:half]} … {line[-half:]}")


class UsageError(DeepLabZooError, ValueError):
    """The call itself was wrong: an unknown option, or values that do not go together."""

    exit_status = 2


class UnknownNameError(UsageError, LookupError):
    """A model, encoder, weights tag or data set that does not exist; the message names the nearest ones that do."""


class UnsupportedStrideError(UsageError):
    """An encoder that cannot run at the output stride asked for; the message names encoders that can."""


class WeightsError(DeepLabZooError):
    """A weights file that cannot be used: damaged, unsafe, of an unknown layout, or for another network."""


class DownloadError(DeepLabZooError):
    """A file that could not be fetched or did not match its published size or hash; nothing partial is left as a result."""


class ChangedFileError(DownloadError):
    """A file that is there and is another one than was published: another size, hash or revision."""


class ImageError(DeepLabZooError):
    """An image that cannot be read: not an image, truncated, empty, or too large."""


class DataError(DeepLabZooError):
    """A data set that is incomplete or inconsistent: a missing folder, an unpaired mask, label values outside the classes."""


class OutputError(DeepLabZooError):
    """A result that cannot be written where it was asked for."""


class TrainingError(DeepLabZooError):
    """A training run that cannot go on: a loss that is no number, a process that was lost, a state that cannot be read."""


class StoppedError(TrainingError):
    """A training run that was asked to stop, by SIGTERM or Ctrl-C, and did; the exit status is 128 + the signal's number."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ` Did you mean 'a', 'b' or 'c'?` for the known names nearest to `name`, or an empty string.

    >>> did_you_mean("resnet5O", ["resnet50", "xception65"])
    " Did you mean 'resnet50'?"
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=count, cutoff=0.5)
    if not near:
        return ""
    quoted = [f"'{one}'" for one in near]
    return f" Did you mean {' or '.join(filter(None, [', '.join(quoted[:-1]), quoted[-1]]))}?"
