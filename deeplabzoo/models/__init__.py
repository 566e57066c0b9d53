"""The model: encoder, atrous head, interpolation, and its configuration; independent of where weights come from."""
