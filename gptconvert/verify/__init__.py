"""The gate: what was exported computes what the checkpoint computes, or nothing is published."""
