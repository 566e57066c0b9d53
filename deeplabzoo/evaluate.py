"""`python -m deeplabzoo.evaluate` runs `deeplabzoo.cli.evaluate`."""

import sys

from deeplabzoo.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
