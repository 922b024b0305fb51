"""Layers that answer each row as its own model."""
