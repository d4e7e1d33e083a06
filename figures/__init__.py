"""DRAWS stored tables. Never loads torch."""
