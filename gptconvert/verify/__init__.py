"""Verification: what all targets share; independent of every target."""
