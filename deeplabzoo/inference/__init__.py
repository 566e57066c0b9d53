"""Image to labels: preprocessing, prediction, overlays, evaluation."""
