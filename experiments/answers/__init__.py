"""Turns tables into answers: criteria, verdicts, and the summary of a sweep."""
