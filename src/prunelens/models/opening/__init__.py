"""Open checkpoints: folders, GGUF files, hub ids and the built-in model."""
