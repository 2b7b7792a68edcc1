"""Compare a dense model with compressed ones on its own texts."""
