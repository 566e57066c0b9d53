"""`python -m deeplabzoo.publish` runs `deeplabzoo.cli.publish`."""

import sys

from deeplabzoo.cli.publish import main

if __name__ == "__main__":
    sys.exit(main())
