"""Commands that measure, and the recorded runs that they wrote (README.md says which and how)."""
