"""First stages: autoencoders trained on images, and latents that are kept on disk."""
