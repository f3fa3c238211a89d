"""Processes that run other programs' graphs: limited in time, memory and access, so that a hostile graph is harmless."""
