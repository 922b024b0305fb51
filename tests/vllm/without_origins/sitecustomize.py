"""First in ``PYTHONPATH``: every process turns shards as if each began at row and column 0, which must be found out."""

from randes.serving.layers import shards

shards.Shard.transform = lambda self, whole: whole  # type: ignore[method-assign]
