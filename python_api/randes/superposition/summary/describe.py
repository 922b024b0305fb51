"""What a superposition holds, for programs and for people."""

from dataclasses import asdict
from typing import Any

from randes.checkpoints.lazy_tensors import headers
from randes.superposition.state import State
from randes.superposition.summary.verify import rank_of

SHOWN = 8
"""Names in a description before they are counted instead."""


def summary(superposition: State) -> dict[str, Any]:
    """Models, transform, sizes in bytes, and which tensors are superposed, kept or shared: ready for JSON."""
    sizes = superposition.sizes
    kept = set(superposition.others)
    shared = superposition.base.keys() - kept - set(superposition.superposed)
    return {
        "models": {
            name: {
                "group": member.group,
                "alpha": member.alpha,
                "tuned_tensors": len(member.alphas),
                "superposed_tensors": len(member.gains),
                "kept_tensors": len(member.kept),
                "kept_bytes": member.kept_bytes,
            }
            for name, member in ((name, superposition.members[name]) for name in superposition.served)
        },
        "config": superposition.config.to_dict(),
        "packed": None if superposition.packing is None else asdict(superposition.packing),
        "bytes": {**asdict(sizes), "total": sizes.total},
        "shard_size": superposition.shard_size,
        "coverage": {
            "superposed": {
                name: f"{text}, rank {rank}" if (rank := rank_of(superposition, name)) else text
                for name, text in _described(superposition, superposition.superposed).items()
                if name not in superposition.unshared
            },
            "each_model_its_own_delta": _described(superposition, sorted(superposition.unshared)),
            {"keep": "kept", "sum": "summed"}.get(superposition.config.others, "averaged"): _described(
                superposition, sorted(kept)
            ),
            "shared_with_base": _described(superposition, sorted(shared)),
        },
    }


def described(superposition: State) -> str:
    """One paragraph for people: which models, what they take, how they are stored."""
    sizes, config, names = superposition.sizes, superposition.config, superposition.names
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    packing = superposition.packing
    bits = "as integers" if packing is None else f"in {packing.bits:g} bit{'s' * (packing.bits > 1)}"
    bases = f", shared bases of {ranks(superposition)}" if config.rank and superposition.superposed else ""
    return (
        f"Superposition of {len(names)} fine-tune{'s' * (len(names) != 1)}{': ' if names else ''}{shown}\n"
        f"  {sizes.total / 1e6:.1f} MB, {sizes.total / sizes.base:.2f} times one model"
        f" ({len(names)} whole models: {sizes.separate_models / 1e6:.1f} MB)\n"
        f"  {len(superposition.superposed)} matrices superposed {bits}, in groups of {config.group_size}{bases}"
    )


def ranks(superposition: State) -> str:
    """How many directions the matrices' shared bases have, in words; empty where there are none by choice."""
    if superposition.config.rank != "auto":
        return f"rank {superposition.config.rank}" if superposition.config.rank else ""
    found = [rank_of(superposition, tensor) for tensor in superposition.superposed]
    return f"rank {min(found)} to {max(found)}, {sum(found) / len(found):.1f} in the mean (auto)"


def _described(superposition: State, names: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Shape and dtype of each tensor."""
    tensors = {name: headers(superposition.base)[name] for name in names}
    return {name: f"{'×'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items()}
