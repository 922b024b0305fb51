"""The command that tells beforehand what a store will take, and how long it takes to make."""

import os
from dataclasses import asdict
from typing import Annotated

import typer

from randes.cli.terminal import Rank, console, errors, print_json, rank_of, say, sized, table
from randes.cluster.plan import Rates, Run, measured, plan_run
from randes.config import Config
from randes.inspect.plan import plan as plan_of
from randes.superposition.basis.shared_basis import MOST

MEGABYTE = 1e6


def plan(
    base: Annotated[str, typer.Option(help="The base model's checkpoint; its shapes are read, not its values.")],
    models: Annotated[int, typer.Option(help="How many fine-tunes there will be.")],
    memory: Annotated[float | None, typer.Option(metavar="GB", help="What servers have, in 10⁹ bytes.")] = None,
    group_size: Annotated[int, typer.Option(help="Models that share one superposition.")] = 8,
    others: Annotated[str, typer.Option(help="What is not superposed: keep, base, average or sum.")] = "keep",
    centre: Annotated[bool, typer.Option(help="As for compress.")] = False,
    rank: Rank = "auto",
    workers: Annotated[
        list[int] | None,
        typer.Option(help="How long so many cores take to make the store, instead; may be given many times."),
    ] = None,
    shard_size: Annotated[str, typer.Option(metavar="BYTES", help="With --workers: as for compress.")] = "2GiB",
    core: Annotated[
        float | None,
        typer.Option(metavar="MB/S", help="With --workers: of checkpoints, that a core superposes; else measured."),
    ] = None,
    read: Annotated[
        float | None,
        typer.Option(metavar="MB/S", help="That a worker reads from where checkpoints are; else measured."),
    ] = None,
    write: Annotated[
        float | None, typer.Option(metavar="MB/S", help="That a worker writes to where the store goes; else measured.")
    ] = None,
    storage: Annotated[
        float | None, typer.Option(metavar="MB/S", help="That all workers read together at most; else no limit.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of a worker for an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what a store will take and cost at each number of bits, before anything is compressed."""
    with errors():
        if memory is not None and not memory > 0:
            raise ValueError(f"--memory must be above 0, got {memory}")
        config = Config(group_size=group_size, others=others, centre=centre, rank=rank_of(rank))  # type: ignore[arg-type]
        given = {"core": core, "read": read, "write": write, "storage": storage}
        if not workers and (alone := [name for name, value in {**given, "price": price}.items() if value is not None]):
            raise ValueError(f"--{alone[0]} goes with --workers, which says how many cores are to make the store")
        if workers:
            known = {name: MEGABYTE * value for name, value in given.items() if value is not None}
            if price is not None and not price >= 0:
                raise ValueError(f"--price must be at least 0, got {price}")
            rates = measured(base, config, cores=min(os.cpu_count() or 1, max(workers)), known=known)
            runs = plan_run(base, models, rates, config, workers=workers, shard_size=shard_size)
            _print_runs(runs, rates, price, as_json)
            return
        rows = plan_of(base, models, config)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    shown = table(
        "bits", "store", "in models", "in memory", "decode, one group", "decode, all groups", "interference", "fits"
    )
    for row in rows:
        fits = "" if memory is None else "yes" if row.serving <= memory * 1e9 else "no"
        costs = f"{row.decode:.2f}x", f"{row.decode_all:.2f}x", f"{row.interference:.2f}"
        store = sized(row.store), f"{row.times:.2f}x"
        shown.add_row(str(row.bits), *store, sized(row.serving), *costs, fits)
    console.print(shown)
    console.print(
        f"As separate models {sized(rows[0].separate)}. Of store and memory at most"
        f" {sized(rows[0].kept)} is what models keep of their own; models that share it with the base need less."
    )
    if config.rank == "auto":
        console.print(
            f"rank auto: the models decide how many directions each matrix keeps, {MOST} at most; this counts all of"
            " those. With --rank 0 there are none."
        )
    console.print(
        "decode: weight bytes that a step reads, in units of one plain model's. interference: noise in a retrieved"
        " delta's weights, in units of the delta; it is not the accuracy: evaluate the models for that."
    )


def _print_runs(runs: list[Run], rates: Rates, price: float | None, as_json: bool) -> None:
    costs = [None if price is None else round(price * run.core_seconds / 3600, 2) for run in runs]
    if as_json:
        rows = [
            {**asdict(run), "core_seconds": run.core_seconds, "cost": cost}
            for run, cost in zip(runs, costs, strict=True)
        ]
        print_json({"rates": asdict(rates), "runs": rows})
        return
    shown = table("workers", "parts", "time", "core hours", "read", "written", "memory of one", "cost")
    for run, cost in zip(runs, costs, strict=True):
        hours, paid = f"{run.core_seconds / 3600:.2f}", "" if cost is None else f"{cost:.2f}"
        moved = sized(run.read), sized(run.written), sized(run.memory)
        shown.add_row(str(run.workers), str(run.parts), lasting(run.seconds), hours, *moved, paid)
    console.print(shown)
    limit = f", all together {sized(int(rates.storage))}/s" if rates.storage else ""
    say(
        f"With {sized(int(rates.core))}/s of checkpoints superposed by a core, {sized(int(rates.read))}/s read and"
        f" {sized(int(rates.write))}/s written by a worker{limit}. Rates that were not given were measured here, now."
        " Workers beyond the number of parts have nothing to do: a smaller --shard-size makes more parts."
    )


def lasting(seconds: float) -> str:
    """A time in words, as "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
