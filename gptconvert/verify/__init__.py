"""Verification: what all targets share. Knows no target."""
