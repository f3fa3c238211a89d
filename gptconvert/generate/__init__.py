"""Text generation with an export."""
