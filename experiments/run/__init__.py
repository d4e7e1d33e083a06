"""Runs stages: which there are, what they need, where they run, what is left of them."""
