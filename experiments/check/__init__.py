"""Checks the suite itself: how fast it is here, and what it survives."""
