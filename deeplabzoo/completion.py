"""`python -m deeplabzoo.completion` runs `deeplabzoo.cli.completion`."""

import sys

from deeplabzoo.cli.completion import main

if __name__ == "__main__":
    sys.exit(main())
