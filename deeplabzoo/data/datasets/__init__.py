"""Readers of the supported dataset layouts, one module each."""
