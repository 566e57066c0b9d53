"""TensorFlow checkpoints without TensorFlow: frozen GraphDefs and TensorFlow Lite files."""
