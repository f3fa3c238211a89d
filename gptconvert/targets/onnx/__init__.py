"""ONNX: a graph built node by node, and its weights, streamed into a file beside it."""
