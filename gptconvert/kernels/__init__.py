"""onnxruntime as a library: compiled code for operations that numpy does one element at a time."""
