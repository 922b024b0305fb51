"""Stores that are made a part at a time: by many machines, or by one whose memory holds no more than a part.

    from randes import cluster
    models = {"german": "s3://models/german", "legal": "s3://models/legal"}
    cluster.compress("s3://models/base", models, out="s3://models/store", run=cluster.on_ray("auto"))

The store is that of ``randes.compress`` and ``save(out, shard_size=...)``, to the byte.
"""

from randes.cluster.compress import Runner, compress, in_this_process
from randes.cluster.on_ray import on_ray
from randes.cluster.plan import Rates, Run, measured, plan_run

__all__ = ["Rates", "Run", "Runner", "compress", "in_this_process", "measured", "on_ray", "plan_run"]
