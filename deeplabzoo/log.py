"""The package's logger: what was loaded is logged at INFO, what was changed or re-initialized at WARNING.

A library configures no handlers: in a program that has not configured logging, Python shows warnings alone on stderr. The
commands call `show_log`, so that whoever runs one also reads the INFO lines.
"""

import logging
import sys

from deeplabzoo.errors import printable


class _PrintableFilter(logging.Filter):
    """Escapes control characters, since class names and file names in a message may come from untrusted files."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = "\n".join(map(printable, record.getMessage().splitlines())), None
        return True


class _StderrHandler(logging.Handler):
    """Writes to the current `sys.stderr`, so that redirection and test capture see the line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


logger = logging.getLogger("deeplabzoo")
logger.addFilter(_PrintableFilter())


def show_log() -> None:
    """Show INFO lines and warnings of this package on stderr, unless the application has configured logging itself."""
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(_StderrHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
