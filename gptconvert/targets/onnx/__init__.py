"""ONNX: a graph built node by node, its weights streamed beside it."""
