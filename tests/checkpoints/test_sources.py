"""Reading checkpoints: what is read is what was written, nothing is unpickled, and what does not fit is refused."""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from models import finetune, linear, net, stored, superposed
from safetensors.torch import save_file

import randes
from randes import CheckpointError
from randes.checkpoints import sources
from randes.checkpoints.fit.tensors import check_fits
from randes.checkpoints.lazy_tensors import raw
from randes.checkpoints.safetensors import DTYPES


def test_a_module_a_mapping_and_a_file_read_the_same(tmp_path: Path) -> None:
    model = net()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    given = [model, model.state_dict(), tmp_path / "model.safetensors", str(tmp_path / "model.safetensors"), tmp_path]
    for source in given:
        tensors = sources.read(source)
        assert tensors.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(tensors[name], value)
            assert not tensors[name].requires_grad


def test_a_folder_is_read_as_all_of_its_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    assert {name: value.tolist() for name, value in sources.read(tmp_path).items()} == {"a": [0, 0], "b": [1, 1, 1]}


@pytest.mark.parametrize(
    "part", ['"more": 1e999', '"more": null', '"\\ud800": 1', '"__metadata__": {"a": "\\ud800"}'], ids=str
)
def test_a_header_that_the_formats_own_reader_refuses_is_refused(part: str, tmp_path: Path) -> None:
    entry = '"dtype": "F32", "shape": [1], "data_offsets": [0, 4]'
    text = f'{{"a": {{{entry}}}, {part}}}' if "metadata" in part else f'{{"a": {{{entry}, {part}}}}}'
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        sources.read(tmp_path / "m.safetensors")


def sharded(folder: Path, tensors: dict[str, torch.Tensor], index: str, shards: int = 3) -> Path:
    """A checkpoint as Transformers and Diffusers save it."""
    folder.mkdir()
    stem, names = index.removesuffix(".safetensors.index.json"), sorted(tensors)
    weight_map = {}
    for number in range(shards):
        own, file = names[number::shards], f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_an_index_says_which_shards_are_read(stem: str, tmp_path: Path) -> None:
    tensors, index = net().state_dict(), f"{stem}.safetensors.index.json"
    folder = sharded(tmp_path / "model", tensors, index)
    save_file(tensors, folder / "consolidated.safetensors")  # the same again, as some publish it
    for path in (folder, folder / index):
        found = sources.read(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
    (folder / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must hold one index"):
        sources.read(folder)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    index = "model.safetensors.index.json"
    folder = sharded(tmp_path / "model", net().state_dict(), index)
    whole = json.loads((folder / index).read_text())["weight_map"]
    shard = "model-00001-of-00003.safetensors"
    first = next(name for name, file in whole.items() if file == shard)
    for weight_map, message in (
        (whole | {first: "absent.safetensors"}, "names absent.safetensors, which is not a file beside it"),
        (whole | {first: "../model/" + shard}, r"must be the name of a file beside it, or .* got .\.\./model/"),
        (whole | {"absent.weight": shard}, f"names absent.weight in {shard}, which does not hold that"),
        (
            {name: file for name, file in whole.items() if name != first},
            f"must name every tensor .* {first} in {shard}",
        ),
        (["a"], "must be an index with a weight_map"),
        (None, "must be an index with a weight_map"),
        ({}, "must hold tensors, got none"),
    ):
        text = "[" if weight_map is None else json.dumps({"weight_map": weight_map})
        (folder / index).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            sources.read(folder)


def test_files_are_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {f'ü "{dtype}\n': torch.arange(6).view(2, 3).to(dtype) for dtype in DTYPES.values()}
    tensors |= {"b": torch.zeros(0, 3), "a": torch.tensor(1.5), "z.weight": torch.randn(70, 30)}
    save_file(tensors, tmp_path / "theirs")
    sources.write_file(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = sources.read_file(tmp_path / "theirs")
    assert all(bytes(raw(found[name])) == bytes(raw(value)) for name, value in tensors.items())


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(tmp_path / "model", net().state_dict(), "model.safetensors.index.json")
    tensors = sources.read(folder)
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("the file was read"))
    check_fits(tensors, net().state_dict())
    assert "head.bias" in tensors
    assert "absent" not in tensors
    with pytest.raises(KeyError):
        tensors["absent"]


def test_shards_that_disagree_about_a_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"\ba\b"):
        sources.read(tmp_path)


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("written", ["zip", "legacy", "pickle", "old pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_pickle_is_refused_with_the_reason_and_never_opened(written: str, suffix: str, tmp_path: Path) -> None:
    path, trace = tmp_path / f"model{suffix}", tmp_path / "trace"
    content = {"weight": torch.ones(2), "trap": Trap(trace)}
    if written in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=written == "zip")
    else:
        path.write_bytes(pickle.dumps(content, protocol=0 if written == "old pickle" else 4))
    reason = (
        "not a whole safetensors file" if written == "old pickle" else "is a pickle, which can run code.*safetensors"
    )
    with pytest.raises(CheckpointError, match=reason):
        sources.read(path)
    assert not trace.exists()


@pytest.mark.parametrize("length", [0, 1, 2, 8, 60, -1])
def test_a_file_that_is_not_whole_is_refused(length: int, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(20)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        sources.read(tmp_path / "a.safetensors")


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    for source, message in (
        (tmp_path, "holds no"),
        (tmp_path / "nowhere", "does not exist"),
        ({}, "got none"),
        (torch.nn.ReLU(), "got none"),
        ([torch.ones(1)], "got list"),
        ({"a": 1}, "a must be a tensor, got int"),
    ):
        with pytest.raises(CheckpointError, match=message):
            sources.read(source)


def test_tied_strided_empty_and_scalar_tensors_are_written_and_read(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4)
    tensors = {
        "weight": weight, "tied": weight, "transposed": weight.T, "row": weight[1], "spread": weight[:1].expand(5, 4),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(7), "half": weight.bfloat16(), "also empty": torch.empty(0),
    }  # fmt: skip
    sources.write_file(tmp_path / "t.safetensors", tensors)
    back = sources.read_file(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_a_digest_tells_values_shapes_and_dtypes_apart() -> None:
    values = torch.arange(4, dtype=torch.int32)
    others = [
        values.flip(0), values.view(2, 2), values.view(4, 1), values.long(), values.view(torch.float32),
        values[:3], torch.empty(0), torch.empty(0, 4), torch.tensor(0.0), torch.tensor(-0.0), torch.zeros(1),
    ]  # fmt: skip
    digests = [sources.digest(value) for value in (values, *others)]
    assert len({*digests}) == len(digests)
    assert sources.digest(values.view(2, 2).T.contiguous()) == sources.digest(values.view(2, 2).T)


def test_a_combined_digest_ignores_order_alone() -> None:
    assert sources.combined_digest({"a": "1", "b": "2"}) == sources.combined_digest({"b": "2", "a": "1"})
    others = [{"a": "1", "b": "2"}, {"a": "2", "b": "1"}, {"a": "1"}, {"a": "12"}, {"a1": "2"}, {}]
    assert len({sources.combined_digest(digests) for digests in others}) == len(others)


def test_reading_does_not_copy_what_is_there() -> None:
    model = linear()
    assert sources.read(model)["weight"].data_ptr() == model.weight.data_ptr()


GOOD = finetune(net(), 5).state_dict()


def changed(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return GOOD | {name.replace("__", "."): value for name, value in tensors.items()}


BAD_CHECKPOINTS = {
    "a tensor too few": ({n: v for n, v in GOOD.items() if n != "head.bias"}, "1 tensors .* missing.*head.bias"),
    "a tensor too many": (changed(head__extra=torch.ones(3)), "not in the base: head.extra"),
    "another shape": (changed(head__bias=torch.ones(6)), r"head.bias must be \(5,\) .* got \(6,\)"),
    "another dtype": (changed(head__bias=torch.ones(5, dtype=torch.float64)), "head.bias .* got .* torch.float64"),
    "nan": (changed(layers__1__up__weight=torch.full((48, 32), math.nan)), "layers.1.up.weight must be finite"),
    "infinity": (changed(head__bias=torch.full((5,), math.inf)), "head.bias must be finite"),
    "nothing that matches": ({"other.weight": torch.ones(48, 32)}, "no tensor matches"),
    "nothing": ({}, "got none"),
    "no tensors": ({"head.bias": [1.0]}, "head.bias must be a tensor, got list"),
    "no checkpoint": (3, "got int"),
}


@pytest.mark.parametrize("method", ["add", "remove"])
@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(kind: str, method: str, tmp_path: Path) -> None:
    sup, _ = superposed(net(), 1, randes.Config(others="average"))
    before = stored(sup, tmp_path / "before")
    bad, message = BAD_CHECKPOINTS[kind]
    with pytest.raises(CheckpointError, match=message):
        getattr(sup, method)("m0" if method == "remove" else "new", bad)
    assert sup.names == ["m0"]
    assert stored(sup, tmp_path / "after") == before


def test_a_checkpoint_that_was_not_added_under_that_name_is_not_removed(tmp_path: Path) -> None:
    sup, tuned = superposed(net(), 2)
    before = stored(sup, tmp_path / "before")
    almost = tuned["m0"].state_dict() | {"head.bias": tuned["m1"].state_dict()["head.bias"]}
    for name, other in (("m0", tuned["m1"]), ("m0", almost), ("m0", net()), ("m1", tuned["m0"])):
        with pytest.raises(CheckpointError, match=f"not the checkpoint that was added as '{name}'"):
            sup.remove(name, other)
    assert stored(sup, tmp_path / "after") == before
