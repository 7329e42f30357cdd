"""Weights of an emitted ONNX graph in fewer bits, with ONNX Runtime's own rounding."""
