"""Many conversions from one list: read the jobs, run each in a process of its own, collect the results."""
