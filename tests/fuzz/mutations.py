"""What comes from outside, damaged at random, and what must be true: an error of randes' own, soon, or a right answer.

``KINDS`` has one function for each thing that is damaged. It takes a ``Corpus`` and its own random numbers, damages a
copy in ``corpus.scratch``, and uses that. It raises ``AssertionError`` for a wrong answer.
"""

import json
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from corpus import Corpus, Files, logits
from damage import TEXTS, damaged_bytes, damaged_json, damaged_tensors, put_something_else
from models import finetune, net
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

import randes
from randes.checkpoints import sources
from randes.checkpoints.configurations import check_configuration
from randes.checkpoints.fit.tensors import check_fits
from randes.checkpoints.lazy_tensors import digests
from randes.checkpoints.lora import ADAPTER_CONFIG
from randes.checkpoints.safetensors import write_file
from randes.cli import app
from randes.errors import RandesError
from randes.superposition.store.manifest import MANIFEST, _checksum, text_of

SLOW = 5.0
"""Seconds after which a use counts as hanging."""
MUCH = 512 << 20
"""Bytes of memory that a use of a few kilobytes must not take."""


# ---------------------------------------------------------------- what is damaged


def stores(corpus: Corpus, chance: Random) -> None:
    """Bytes of any file of a store: what comes out is the same to the bit, or nothing."""
    kind = chance.choice(list(corpus.stores))
    files = dict(corpus.stores[kind])
    name = chance.choice(list(files))
    files[name] = damaged_bytes(chance, files[name], list(files.values()))
    folder = corpus.put(files)
    sup = randes.Superposition.load(folder, check=chance.random() < 0.5)
    model = chance.choice(sup.names)
    _same(sup.retrieve(model), corpus.answers[kind][model])


def manifests(corpus: Corpus, chance: Random) -> None:
    """Hostile content under a checksum that is right: whatever is let through can be used."""
    files = dict(corpus.stores[chance.choice(list(corpus.stores))])
    manifest = damaged_json(chance, json.loads(files[MANIFEST]))
    _use(corpus, chance, _written(files, manifest))


def contents(corpus: Corpus, chance: Random) -> None:
    """The same, with other tensors than the manifest says."""
    files = dict(corpus.stores[chance.choice(list(corpus.stores))])
    manifest = json.loads(files[MANIFEST])
    name = chance.choice(list(manifest["files"]))
    folder = corpus.put(files)
    found = damaged_tensors(chance, {t: v.clone() for t, v in sources.read_file(folder / name).items()})
    if not found:
        return
    write_file(folder / "other", found)
    known = digests(found)
    other = f"{name.rsplit('-', 1)[0]}-{sources.combined_digest(known)}.safetensors"
    del manifest["files"][name], files[name]
    manifest["files"][other], files[other] = known, (folder / "other").read_bytes()
    if manifest.get("sizes", {}).pop(name, None) is not None:
        manifest["sizes"][other] = len(files[other])
    _use(corpus, chance, _written(files, manifest))


def special_files(corpus: Corpus, chance: Random) -> None:
    """Something that is no file in the place of one: no store, whatever lies behind it."""
    if chance.random() < 0.7:
        kind = chance.choice(list(corpus.stores))
        folder = corpus.put(corpus.stores[kind])
        put_something_else(chance, folder / chance.choice(list(corpus.stores[kind])))
        found = randes.Superposition.load(folder, check=False)
        raise AssertionError(f"{found} was loaded")
    folder = corpus.put(chance.choice((corpus.checkpoint, corpus.shards, corpus.adapter, corpus.transformers)))
    put_something_else(chance, chance.choice(sorted(folder.iterdir())))
    _read(corpus, folder)


def checkpoints(corpus: Corpus, chance: Random) -> None:
    """Bytes of a checkpoint, which has no digests."""
    files = dict(chance.choice((corpus.checkpoint, corpus.shards, corpus.adapter)))
    name = chance.choice(list(files))
    files[name] = damaged_bytes(chance, files[name], list(files.values()))
    _read(corpus, corpus.put(files))


def indexes(corpus: Corpus, chance: Random) -> None:
    """The content of an index."""
    files = dict(corpus.shards)
    name = next(name for name in files if name.endswith("json"))
    files[name] = _json(damaged_json(chance, json.loads(files[name])))
    _read(corpus, corpus.put(files))


def headers(corpus: Corpus, chance: Random) -> None:
    """The content of a safetensors header, with the right length before it."""
    files = dict(chance.choice((corpus.checkpoint, corpus.adapter)))
    name = next(name for name in files if name.endswith("safetensors"))
    length = int.from_bytes(files[name][:8], "little")
    header = _json(damaged_json(chance, json.loads(files[name][8 : 8 + length])))
    files[name] = len(header).to_bytes(8, "little") + header + files[name][8 + length :]
    folder = corpus.put(files)
    found = sources.read_file(folder / name)
    with safe_open(folder / name, "pt") as own:  # the format's own reader
        _same(found, {name: own.get_tensor(name) for name in own.keys()})  # noqa: SIM118
    _read(corpus, folder)


def adapters(corpus: Corpus, chance: Random) -> None:
    """An adapter's configuration."""
    files = dict(corpus.adapter)
    config = damaged_json(chance, json.loads(files[ADAPTER_CONFIG]))
    if isinstance(config, dict) and chance.random() < 0.3:
        config["rank_pattern"] = {"".join(chance.choices(("up", ".*", "(", ")", "|", "+", "a", "\\d"), k=9)): 4}
    files[ADAPTER_CONFIG] = _json(config)
    _read(corpus, corpus.put(files))


STRANGE: dict[str, tuple[Any, ...]] = {
    "n_layer": (10**5, 10**6, 10**9, -1), "num_labels": (10**5, 10**9, -1), "n_embd": (33, 10**6, 10**9, 2**62, -1),
    "n_positions": (10**5, 10**9, 2**62), "vocab_size": (51, 10**8, 10**12),
    "architectures": (["pipeline"], ["AutoModel"], ["GPT2Model"], ["utils"], [], ["BertModel"]),
    "model_type": ("bert", "nobody"), "dtype": ("auto", "int8", "float64", "nn"), "activation_function": ("x", "a/b"),
    "_attn_implementation": ("flash_attention_2", "someone/code", "eager"), "attn_implementation": ("someone/code", 3),
    "auto_map": ({"AutoConfig": "a.B"}, {"AutoConfig": "someone--a.B"}), "transformers_weights": ("../a", "b.bin", 3),
    "quantization_config": (
        {}, {"quant_method": "randes"}, {"quant_method": "randes", "base": "../a"},
        *({"quant_method": method, "base": "model.safetensors"} for method in ("randes", "gptq", "fp8", "nobody")),
    ),
}  # fmt: skip
"""Of a model's configuration."""


def configurations(corpus: Corpus, chance: Random) -> None:
    """The configuration of a Transformers model, as the base's and as a fine-tune's."""
    folder = corpus.put(_configured(corpus, chance))
    if chance.random() < 0.5:
        check_configuration({"config.json": corpus.transformers["config.json"]}, folder)
    else:
        randes.Superposition.create(folder)


def loaded_models(corpus: Corpus, chance: Random) -> None:
    """Files of a Transformers model that is loaded to serve a store."""
    files = _configured(corpus, chance) if chance.random() < 0.8 else dict(corpus.transformers)
    if files == corpus.transformers:
        name = chance.choice(["generation_config.json", "model.safetensors"])
        files[name] = damaged_bytes(chance, files[name], list(files.values()))
    folder = corpus.put(files)
    if chance.random() < 0.1:
        put_something_else(chance, folder / chance.choice(list(files)))
    found = logits(randes.from_pretrained(folder, corpus.served))
    assert torch.allclose(found.float(), corpus.logits, atol=1e-4)  # attention may be computed by other code


def _configured(corpus: Corpus, chance: Random) -> Files:
    config = json.loads(corpus.transformers["config.json"])
    if chance.random() < 0.5:
        config = damaged_json(chance, config)
    if isinstance(config, dict) and chance.random() < 0.6:
        key = chance.choice(list(STRANGE))
        config[key] = chance.choice(STRANGE[key])
    return {**corpus.transformers, "config.json": _json(config)}


def names(corpus: Corpus, chance: Random) -> None:
    """Names of models: refused, or stored, found again, and shown without what a terminal obeys."""
    name = chance.choice((chance.choice(TEXTS), "".join(chr(chance.randrange(0x11000)) for _ in range(5))))
    folder = corpus.put(corpus.stores["integers"])
    sup = randes.Superposition.load(folder)
    try:
        sup.add(name, finetune(net(), 5))
    except ValueError as error:
        raise RandesError(str(error)) from error
    sup.save(folder)
    assert name in randes.Superposition.load(folder).names
    for arguments in (["info", str(folder)], ["info", str(folder), "--json"]):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0
        assert not [c for c in shown.output if c != "\n" and not c.isprintable()], shown.output


KINDS: dict[str, tuple[Callable[[Corpus, Random], None], int]] = {
    "bytes of stores": (stores, 30), "manifests": (manifests, 30), "tensors of stores": (contents, 10),
    "bytes of checkpoints": (checkpoints, 15), "headers": (headers, 10), "indexes": (indexes, 10),
    "adapters' configurations": (adapters, 10), "models' configurations": (configurations, 2),
    "models that are loaded": (loaded_models, 3), "pipes, links, devices": (special_files, 5), "names": (names, 1),
}  # fmt: skip
"""And how often each of them is damaged."""


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _written(files: Files, manifest: Any) -> Files:
    if isinstance(manifest, dict):
        manifest["checksum"] = _checksum(manifest)
    return {**files, MANIFEST: text_of(manifest).encode("utf-8", "surrogatepass")}


def _use(corpus: Corpus, chance: Random, files: Files) -> None:
    folder = corpus.put(files)
    sup = randes.Superposition.load(folder, check=chance.random() < 0.2)
    for name in sup.names[:2]:
        sup.retrieve(name)
    if chance.random() < 0.2:
        sup.save(corpus.scratch / "again")
        randes.Superposition.load(corpus.scratch / "again")
        if sup.packing is None and sup.names:
            sup.pack(4)


def _read(corpus: Corpus, folder: Path) -> None:
    """All that is read of a checkpoint before it is superposed."""
    tensors = sources.read(folder, corpus.base)
    check_fits(tensors, corpus.base)
    digests(tensors, look=sources.check_finite)


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ---------------------------------------------------------------- many of them


class HangError(BaseException):
    """A use took too long."""


@contextmanager
def soon() -> Iterator[None]:
    """Raises ``HangError`` after ``SLOW`` seconds."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak() -> int:
    """The most memory that this process has had, in bytes (proc(5), VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def damage(corpus: Corpus, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """Damages of the seeds ``first`` and on. How many there were of each kind and end, and what must not be."""
    kinds, weights = [*KINDS], [weight for _, weight in KINDS.values()]
    ends: Counter[str] = Counter()
    wrong = []
    highest = _peak()
    for seed in range(first, first + count):
        chance = Random(seed)
        kind = chance.choices(kinds, weights)[0]
        began = time.monotonic()
        try:
            with soon(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                KINDS[kind][0](corpus, chance)
            end = "used"
        except RandesError:
            end = "refused"
        except AssertionError as error:
            end = "WRONG"
            wrong.append(f"seed {seed}, {kind}: a wrong answer: {str(error)[:200]}")
        except HangError:
            end = "HUNG"
            wrong.append(f"seed {seed}, {kind}: more than {SLOW} s")
        except Exception as error:
            end = "FOREIGN"
            wrong.append(f"seed {seed}, {kind}: {type(error).__name__}: {str(error)[:200]}")
        if time.monotonic() - began > SLOW and end != "HUNG":
            end = "HUNG"
            wrong.append(f"seed {seed}, {kind}: {time.monotonic() - began:.1f} s")
        if (peak := _peak()) > highest + MUCH:
            end = "LARGE"
            wrong.append(f"seed {seed}, {kind}: {(peak - highest) >> 20} MiB of memory")
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is used now
            peak = _peak()
        highest = max(highest, peak)
        ends[f"{kind}: {end}"] += 1
    os.makedirs(corpus.scratch, exist_ok=True)
    return ends, wrong
