"""`python -m deeplabzoo.export` runs `deeplabzoo.cli.export`."""

import sys

from deeplabzoo.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
