"""The directory that a command writes: lock, journal, atomic files. Knows nothing of MoE."""
