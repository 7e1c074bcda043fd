"""NVFP4 MoE layers of a source: discovery, validation, activation, scalars."""
