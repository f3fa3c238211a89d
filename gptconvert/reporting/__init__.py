"""Reports for people and for CI systems, made from the plain values of ``--json`` alone."""
