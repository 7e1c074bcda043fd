"""Helpers without knowledge of checkpoints: buffers, text for people, progress."""
