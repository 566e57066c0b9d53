"""Name to model: registry, manifest, files, and the conversion of foreign checkpoints."""
