"""TensorFlow SavedModel: a graph with named signatures, built in a process of its own, and streamed weights."""
