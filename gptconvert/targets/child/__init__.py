"""Child processes that run graphs; those of unknown origin with limits on time, memory and access."""
