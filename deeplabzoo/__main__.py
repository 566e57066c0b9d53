"""`python -m deeplabzoo`: the console script `deeplabzoo`."""

from deeplabzoo.cli.main import main

raise SystemExit(main())
