"""Name tables and configurations of the original trainers' formats."""
