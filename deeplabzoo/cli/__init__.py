"""Command line: one module per command, their shared parser, and the console script `deeplabzoo`."""
