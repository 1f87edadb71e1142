"""Reads the checkpoints and pipelines of others."""
