"""Studies of checkpoints that others have trained: install, audit, scrub, decay."""
