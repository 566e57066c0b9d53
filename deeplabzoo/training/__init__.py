"""Training: a recipe (a function that returns a frozen dataclass) becomes a folder with weights, log, curves and report.

`python -m deeplabzoo.train --list` lists the recipes.
"""
