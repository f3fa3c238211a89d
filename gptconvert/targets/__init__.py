"""Output formats: a checkpoint → planned files. Nothing here knows where the checkpoint came from."""
