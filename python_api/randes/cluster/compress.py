"""A store, part by part: shared out, made by whoever does it, and put together by its manifest."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from randes.checkpoints.files import make_folder
from randes.checkpoints.lazy_tensors import Progress, silent
from randes.checkpoints.remote.locations import location
from randes.checkpoints.sources import Checkpoint
from randes.cluster.parts import Job, Part, Plan, Written, made, planned
from randes.config import Config
from randes.errors import RandesError
from randes.serving.servable import servable
from randes.superposition.compress import check_models, with_options
from randes.superposition.members import Member, check_scales
from randes.superposition.store.contents import StoreFile, bytes_of
from randes.superposition.store.files import by_stem
from randes.superposition.store.write import check_new, write
from randes.superposition.superposition import Superposition

Runner: TypeAlias = Callable[[Callable[[Job, int], Part], Job, range], Iterable[Part]]
"""Calls a function with a job and each number, anywhere and in any order, again where a machine was lost; answers with
what it gives, in any order."""


def in_this_process(function: Callable[[Job, int], Part], job: Job, numbers: range) -> Iterator[Part]:
    """A ``Runner``: one part after the other, which is all that is in memory."""
    return (function(job, number) for number in numbers)


def compress(
    base: str | os.PathLike[str], models: Mapping[str, str | os.PathLike[str]], config: Config | None = None, *,
    out: str | os.PathLike[str], shard_size: int | str = "2GiB", alpha: float = 1.0, run: Runner = in_this_process,
    progress: Progress = silent, **options: Any,
) -> None:  # fmt: skip
    """Superpose fine-tunes of one base into a new store, a part of its files at a time.

    The bytes are those of ``randes.compress(base, models, config, alpha=alpha).save(out, shard_size=shard_size)``.

    base, models: paths or addresses, and names on the Hugging Face hub, that each machine can read; no modules.
    out: a folder that each machine can write to, or an address; new or empty.
    shard_size: bytes of tensors in a file, above 0. A part has about as many of the base, and is what one task has in
        memory of every group.
    run: who makes the parts, by default this process, one after the other; ``on_ray`` for a cluster.
    config, options, alpha: as for ``randes.compress``; no calibration.
    progress: told of the bytes of all checkpoints, and of those of each part that is done.
    Raises what ``randes.compress`` and ``Superposition.save`` raise. ``out`` has no manifest then, and may have files;
    the same call can be made again.
    """
    paths = {"base": base, **{f"models[{name!r}]": path for name, path in models.items()}}
    for what, path in paths.items():
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"{what} must be a path or an address, which others can read, got {type(path).__name__}")
    if (limit := bytes_of(shard_size)) == 0:
        raise ValueError("shard_size must be above 0: each part is written to files of its own")
    config = with_options(config or Config(), options).resolved(together=True)
    check_models(models, config, alpha)
    if callable(config.include):
        raise ValueError("config.include must be patterns, which others can be told, got a function")
    folder = location(out)
    check_new(folder)
    config = servable(_named(base), config)
    job = Job(_named(base), {name: _named(path) for name, path in models.items()}, config, alpha, _named(out), limit)
    plan = planned(job)
    numbers = range(plan.count)
    make_folder(folder)
    step = progress("superposing", sum(map(plan.nbytes, numbers)))
    parts: dict[int, Part] = {}
    for part in run(made, job, numbers):
        parts[part.number] = part
        step(plan.nbytes(part.number))
    if missing := [number for number in numbers if number not in parts]:
        raise RandesError(f"all {plan.count} parts must be made, got none of number {missing[0]}")
    _put_together(job, plan, [parts[number] for number in numbers])


def _named(path: Checkpoint) -> str:
    """As a machine with the same folders reads it."""
    assert isinstance(path, str | os.PathLike)
    text = os.fspath(path)
    return os.path.abspath(text) if os.path.lexists(text) else text


def _put_together(job: Job, plan: Plan, parts: list[Part]) -> None:
    """Write the manifest over all parts' files."""
    sup, config = plan.sup, parts[0].config
    digests = {name: digest for part in parts for name, digest in part.base_digests.items()}
    whole = Superposition(config, sup.base, sup.superposed, digests, layout=sup.layout)
    whole.model_files, whole.to_files = sup.model_files, sup.to_files
    for name in parts[0].records:
        record: dict[str, Any] = {}
        for part in parts:
            for key, value in part.records[name].items():
                record[key] = {**record.get(key, {}), **value} if isinstance(value, dict) else value
        whole.members[name] = Member(**record)
        check_scales(name, whole.members[name])
    found: dict[str, Written] = {name: file for part in parts for name, file in part.files.items()}
    ordered = [name for _, names in sorted(by_stem(found).items()) for name in names]
    files = {name: StoreFile({}, found[name].digests, found[name].nbytes) for name in ordered}
    folder = location(job.out)
    there = {folder / name: found[name].state for name in ordered}
    write(whole, folder, files, job.shard_size, there=there)
