"""A program lowered to one ONNX graph with a key/value cache: rewrites first, then operations."""
