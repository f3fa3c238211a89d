"""Write planned files, check and hash the source in the same pass, and publish the directory atomically."""
