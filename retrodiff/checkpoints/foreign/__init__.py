"""What reading the checkpoints and pipelines of others takes."""
