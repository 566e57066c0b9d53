"""Publishing: a finished run as a release (weights, golden logits, metrics, manifest row, model card), and `push_to_hub`."""
