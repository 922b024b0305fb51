"""Commands that make a store."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from randes import fusionbench
from randes.checkpoints.remote.locations import location
from randes.cli.terminal import (
    Json,
    ShardSize,
    errors,
    named,
    note,
    packed,
    print_sizes,
    progress,
    rank_of,
    say,
    shard_bytes,
)
from randes.cluster import compress as by_cluster
from randes.cluster import on_ray
from randes.config import Config
from randes.fusionbench import Options
from randes.inspect.choose import Wanted, choose, settled
from randes.serving.servable import compress as make
from randes.superposition.lora_factors import superpose_adapters as make_of_adapters
from randes.superposition.store.contents import UNITS
from randes.superposition.store.manifest import MANIFEST
from randes.superposition.store.write import check_new
from randes.superposition.superposition import Superposition

BYTES = {unit: UNITS[unit] for unit in ("mb", "gb", "mib", "gib")}


def compress(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Option(
            help="The base model: safetensors, a folder of them, their index, a name on the Hugging Face hub, or an"
            " address of any of them, as s3://bucket/base."
        ),
    ],
    model: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="A fine-tune, or a LoRA adapter's folder; may be given many times."),
    ],
    out: Annotated[
        str,
        typer.Option(metavar="DIR", help="Where the store goes, a folder or an address; must not hold one yet."),
    ],
    signs: Annotated[str, typer.Option(help="both, columns or none.")] = "both",
    permute: Annotated[int, typer.Option(help="Granule of the column permutation; 0 for none.")] = 0,
    shuffle_layers: Annotated[
        int, typer.Option(help="-1 to shuffle same-named layers, s > 0 to move the i-th model's by i · s.")
    ] = 0,
    group_size: Annotated[int, typer.Option(help="Models that share one superposition.")] = 8,
    seed: Annotated[int, typer.Option(help="Of all signs and permutations.")] = 0,
    others: Annotated[str, typer.Option(help="What is not superposed: keep, base, average or sum.")] = "keep",
    include: Annotated[
        list[str] | None,
        typer.Option("--only", "--include", help="Pattern of the tensors to superpose; replaces the default."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors not to superpose, besides those of the default.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Without what is not superposed by default; --exclude counts alone.")
    ] = False,
    embeddings: Annotated[
        str, typer.Option(help="Embedding tables: own, a delta for each model alone; shared as matrices are; or keep.")
    ] = "own",
    min_width: Annotated[int, typer.Option(help="Narrower matrices are not superposed.")] = Config.min_width,
    centre: Annotated[
        bool, typer.Option(help="Measure deltas from the mean of the fine-tunes; the base is then superposed too.")
    ] = False,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="auto|INTEGER",
            help="Directions of each matrix in which every model keeps its own delta; 0 for none. By default auto, and"
            " 0 with a dense matrix or an origin of zero.",
        ),
    ] = None,
    matrix: Annotated[
        str, typer.Option(help="What turns columns: signs, or in their place rotation, diagonal or dense.")
    ] = "signs",
    gains: Annotated[str, typer.Option(help="own: all deltas in one size; shared: summed as they are.")] = "own",
    origin: Annotated[str, typer.Option(help="base, or zero to superpose the weights themselves.")] = "base",
    every: Annotated[int, typer.Option(help="Superpose only every n-th of the tensors that are selected.")] = 1,
    per_layer: Annotated[bool, typer.Option(help="A transform for each tensor, or one for all of a model.")] = True,
    vectors: Annotated[bool, typer.Option(help="Superpose selected biases, norms and other vectors too.")] = False,
    alpha: Annotated[float, typer.Option(help="What all models' deltas are scaled by when they are used.")] = 1.0,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIMES",
            help="Choose bits, groups and, unless --matrix is given, a rotation for a whole store of at most so many"
            " models, 1.3x.",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="The same, of at most so many bytes, 24GB.")
    ] = None,
    quality: Annotated[
        float | None, typer.Option(help="The same, that keeps so many % of each fine-tune's gain, as predicted.")
    ] = None,
    master: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the store goes that models can be added to, beside the chosen one."),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="YAML", help="FusionBench's keys of a RanDeS method; flags override them."),
    ] = None,
    shard_size: ShardSize = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Have a Ray cluster make the store, a task a part of its files (of 2GiB unless --shard-size is given):"
            " its address, auto for the one that this machine is in, or local for this machine's cores.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Superpose fine-tunes of one base into a new store."""
    with errors(), progress() as begin:
        if (location(out) / MANIFEST).exists():
            raise ValueError(f"--out must not hold a store yet, got {out}; use 'randes add' to add to it")
        options: dict[str, Any] = {} if include is None else {"include": tuple(include)}
        options["exclude"] = (*(() if everything else Config.exclude), *(exclude or ()))
        options |= {
            "signs": signs, "permute": permute, "shuffle_layers": shuffle_layers, "group_size": group_size,
            "seed": seed, "others": others, "centre": centre,
            "rank": None if rank is None else rank_of(rank), "min_width": min_width,
            "matrix": matrix, "gains": gains, "origin": origin, "every": every, "per_layer": per_layer,
            "vectors": vectors, "embeddings": embeddings,
        }  # fmt: skip
        models = named(model)
        chosen = Options(Config(**options), alpha, False, ())
        if config_file is not None:
            chosen = fusionbench.options(fusionbench.read(config_file), len(models))
            options["exclude"] = (*(() if everything else chosen.config.exclude), *(exclude or ()))
            chosen = _overridden(chosen, context, options)
        check_new(location(out))
        files = {"shard_size": shard_bytes(shard_size)}
        wanted = _wanted(context, budget, memory, quality, master)
        if wanted is not None and chosen.lora:
            raise ValueError("--budget, --memory and --quality are for fine-tunes, got a configuration of adapters")
        if ray is not None:
            if wanted is not None or chosen.lora:
                raise ValueError("--ray must be left out with --budget, --memory, --quality and adapters' factors")
            by_cluster(
                base, models, chosen.config, out=out, shard_size=shard_size or "2GiB", alpha=chosen.alpha,
                run=on_ray(ray), progress=begin,
            )  # fmt: skip
            superposition = Superposition.load(out, check=False)
        elif chosen.lora:
            if alpha != 1.0:
                raise ValueError(f"alpha must be left out for adapters: merge-adapter --scaling takes it; got {alpha}")
            superposition = make_of_adapters(base, models, chosen.config, progress=begin)
        else:
            config = chosen.config
            if wanted is not None:
                rotations = "matrix" not in _given(context)
                choice = choose(base, len(models), **vars(wanted), config=config, rotations=rotations)
                note(f"to be {wanted}: {choice}") if as_json else say(f"to be {wanted}: {choice}")
                config = choice.config
            superposition = make(base, models, config, alpha=chosen.alpha, progress=begin)
        if wanted is not None:
            choice = settled(superposition, wanted)
            if master is not None:
                superposition.save(master, **files, progress=begin)
            superposition = packed(superposition, begin, **choice.packing)
            note(f"chosen: {choice}") if as_json else say(f"chosen: {choice}")
        if ray is None:
            superposition.save(out, **files, progress=begin)
    print_sizes(superposition, as_json, store=str(out))


def _wanted(
    context: typer.Context, budget: str | None, memory: str | None, quality: float | None, master: str | None
) -> Wanted | None:
    """What a store is chosen for; None where it is the integers, in the groups that were given."""
    if budget is None and memory is None and quality is None:
        if master is not None:
            raise ValueError("--master goes with --budget, --memory or --quality; without them --out is that store")
        return None
    if "group_size" in _given(context):
        raise ValueError("--group-size must be left out with --budget, --memory and --quality, which choose it")
    if master is not None:
        check_new(location(master))
    times = None if budget is None else _number("--budget", budget, {"x": 1, "": 1})
    nbytes = None if memory is None else int(_number("--memory", memory, BYTES))
    return Wanted(times, nbytes, quality)


def _number(flag: str, text: str, units: dict[str, int]) -> float:
    """A number and its unit. Raises ``ValueError`` for another."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or (unit := found[2].lower()) not in units:
        raise ValueError(
            f"{flag} must be a number with one of the units {', '.join(filter(None, units))}, got {text!r}"
        )
    return float(found[1]) * units[unit]


def _given(context: typer.Context) -> set[str]:
    """The flags that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _overridden(found: Options, context: typer.Context, flags: dict[str, Any]) -> Options:
    """FusionBench's configuration, with the flags that were given in its place; its notes go to standard error."""
    for text in found.notes:
        note(text)
    given = _given(context)
    given |= {"exclude"}  # which holds what the configuration says
    config = replace(found.config, **{name: value for name, value in flags.items() if name in given})
    return found._replace(config=config, alpha=context.params["alpha"] if "alpha" in given else found.alpha)


def superpose_adapters(
    base: Annotated[str, typer.Option(help="The model that the adapters were trained on; its shapes are read.")],
    adapter: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="A LoRA adapter's folder; may be given many times.")
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the store goes; must not hold one yet.")],
    signs: Annotated[str, typer.Option(help="As for compress.")] = "both",
    matrix: Annotated[str, typer.Option(help="As for compress.")] = "signs",
    gains: Annotated[str, typer.Option(help="As for compress.")] = "own",
    shuffle_layers: Annotated[int, typer.Option(help="As for compress.")] = 0,
    group_size: Annotated[int, typer.Option(help="As for compress.")] = 8,
    seed: Annotated[int, typer.Option(help="As for compress.")] = 0,
    per_layer: Annotated[bool, typer.Option(help="As for compress.")] = True,
    shard_size: ShardSize = None,
    as_json: Json = False,
) -> None:
    """Superpose the factors of LoRA adapters, A and B, which merge-adapter multiplies again."""
    with errors(), progress() as begin:
        check_new(location(out))
        files = {"shard_size": shard_bytes(shard_size)}
        options: dict[str, Any] = {"matrix": matrix, "gains": gains, "per_layer": per_layer}
        config = Config(signs, 0, shuffle_layers, group_size, seed, **options)  # type: ignore[arg-type]
        superposition = make_of_adapters(base, named(adapter), config, progress=begin)
        superposition.save(out, **files, progress=begin)
    print_sizes(superposition, as_json, store=str(out))
