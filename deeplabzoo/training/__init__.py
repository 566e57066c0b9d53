"""Training: a recipe (a function returning a frozen dataclass) becomes a folder with weights, log, curves and report.

It may import everything below; only `publishing`, which reads its runs, imports it. `python -m deeplabzoo.train --list` shows
the recipes.
"""
