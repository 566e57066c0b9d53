"""Training: a recipe (a function returning a frozen dataclass) becomes a folder with weights, log, curves and report.

The topmost layer: it may import everything below, nothing imports it. `python -m deeplabzoo.train --list` shows the recipes.
"""
