"""Checkpoints and stores in object storage and wherever else fsspec leads: ``s3://``, ``gs://``, ``hf://``, ``memory://``."""
