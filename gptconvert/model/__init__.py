"""A checkpoint as a value: lazy tensors, transforms, name tables, options. No file formats, no frameworks."""
