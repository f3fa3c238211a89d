"""Text generation with an exported model."""
