"""A prepared checkpoint: manifest, stamp, model card, and reading it."""
