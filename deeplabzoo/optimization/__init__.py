"""Optimized inference: layer fusion, backends (torch, ONNX Runtime, OpenVINO), quantization, backend selection."""
