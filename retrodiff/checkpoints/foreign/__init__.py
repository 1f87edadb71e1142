"""Readers of checkpoints and pipelines that other programs wrote."""
