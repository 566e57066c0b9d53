"""What `python -m deeplabzoo.benchmark` measures, one idea per module; it may import everything, and nothing imports it."""
