"""`python -m deeplabzoo.demo` runs `deeplabzoo.cli.demo`."""

import sys

from deeplabzoo.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
