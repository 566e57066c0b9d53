"""`python -m deeplabzoo.info` runs `deeplabzoo.cli.info`."""

import sys

from deeplabzoo.cli.info import main

if __name__ == "__main__":
    sys.exit(main())
