"""The version of the JSON that other programs read: the objects of ``--json`` and ``manifest.json``."""

#: Incremented when a key changes its meaning or is removed; adding a key does not change it.
SCHEMA_VERSION = 1
