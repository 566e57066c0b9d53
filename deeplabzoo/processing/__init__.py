"""Between images and the model: preprocessing to tensors, and logits to label maps at the size of the image."""
