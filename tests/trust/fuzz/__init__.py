"""Fuzzing of every parser that reads what nobody vouches for: `python -m fuzz NAME` from tests/trust, or `make soak`."""
