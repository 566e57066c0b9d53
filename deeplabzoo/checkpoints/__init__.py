"""Checkpoint files: read (never unpickled), converted to this package's layout, built into a DeepLab, written."""
