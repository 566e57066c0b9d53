"""Evaluation: metrics, reports, plots, and published metrics measured again."""
