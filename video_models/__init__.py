"""What paints: one file per family of video models."""
