"""`python -m deeplabzoo.convert` runs `deeplabzoo.cli.convert`."""

import sys

from deeplabzoo.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
