"""Export of models to files for other runtimes, with verified outputs; the command is `python -m deeplabzoo.export`."""
