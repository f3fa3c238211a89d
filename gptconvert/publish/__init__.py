"""Writing and publishing: planned files to bytes on disk, checked, hashed, and put in place whole or not at all."""
