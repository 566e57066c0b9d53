"""Benchmarks of single functions, and the tables and charts written from the recorded runs."""
