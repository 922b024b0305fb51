"""Directions that all models of a superposition share, in which each keeps its own delta exactly."""
