"""MEASURES models: components, grafts, activity, reversion, statistics, verdicts."""
