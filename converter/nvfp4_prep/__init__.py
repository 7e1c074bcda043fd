"""Prepares NVFP4 mixture-of-experts checkpoints for FlashInfer's CuteDSL fused-MoE kernel."""

__version__ = "0.1.0"
