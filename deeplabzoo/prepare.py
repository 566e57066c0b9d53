"""`python -m deeplabzoo.prepare` runs `deeplabzoo.cli.prepare`."""

import sys

from deeplabzoo.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
