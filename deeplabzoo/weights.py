"""`python -m deeplabzoo.weights` runs `deeplabzoo.cli.weights`."""

import sys

from deeplabzoo.cli.weights import main

if __name__ == "__main__":
    sys.exit(main())
