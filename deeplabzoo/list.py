"""`python -m deeplabzoo.list` runs `deeplabzoo.cli.list`."""

import sys

from deeplabzoo.cli.list import main

if __name__ == "__main__":
    sys.exit(main())
