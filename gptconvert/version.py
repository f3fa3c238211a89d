"""The version of gptconvert: part of every manifest and ONNX file."""

__version__ = "0.1.0"
