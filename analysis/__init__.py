"""MEASURES models: components, grafts, activity, behaviour, reversion, statistics."""
