"""Modules that answer as many models: who is asked for which row, and who comes and goes meanwhile."""
