"""`python -m deeplabzoo.benchmark` runs `deeplabzoo.cli.benchmark`."""

import sys

from deeplabzoo.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
