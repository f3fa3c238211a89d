"""Families as their original trainers name and configure them."""
