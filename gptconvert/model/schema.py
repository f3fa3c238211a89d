"""The version of the JSON that other programs read: the objects of ``--json`` and ``manifest.json``."""

#: Raised when a key changes its meaning or goes away; a new key does not raise it.
SCHEMA_VERSION = 1
