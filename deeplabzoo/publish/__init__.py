"""Publishing: the folder of a finished run becomes a release: weights, golden logits, figures, a manifest row and a model card.

It stands above everything, the trainer included, since it reads runs; only the command `deeplabzoo.publish` imports it.
"""
