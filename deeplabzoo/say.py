"""One line to the person at the terminal: what was loaded, adapted or fallen back from (principle: nothing silent)."""

import logging
import sys

from deeplabzoo.errors import printable

logger = logging.getLogger("deeplabzoo")


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at that moment, so that redirection and test capture both see the line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def say(line: str) -> None:
    """Log one line at INFO on the `deeplabzoo` logger; it goes to stderr unless the application configured logging itself.

    Silence it with `logging.getLogger("deeplabzoo").setLevel(logging.WARNING)`.
    """
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(_StderrHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    logger.info("%s", "\n".join(map(printable, line.splitlines())))
