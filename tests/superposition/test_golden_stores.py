"""Stores that were written before are loaded, saved to the same bytes, and made again of the same models."""

import json
import tarfile
from pathlib import Path

import golden_stores
import pytest

import randes


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(golden_stores.FILE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


KINDS = [*golden_stores.CONFIGS, *(f"{kind} in {bits} bits" for kind in ("plain", "basis") for bits in (8, 4, 2))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_is_loaded_and_saved_to_the_same_bytes(kind: str, stores: Path, tmp_path: Path) -> None:
    sup = randes.Superposition.load(stores / kind)
    sup.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(stores / kind)


def test_models_come_out_as_they_did(stores: Path) -> None:
    known = json.loads((stores / "retrieved.json").read_text(encoding="utf-8"))
    assert len(known) == 13
    for kind, models in known.items():
        sup = randes.Superposition.load(stores / kind)
        assert {name: golden_stores.digests(sup, name) for name in golden_stores.NAMES} == models


def test_the_same_models_make_the_same_bytes(stores: Path, tmp_path: Path) -> None:
    made = 0
    for kind, sup in golden_stores.stores():
        if sup.bases or sup.packing:
            continue  # products depend on the processor in their last bits; steps were the least square's then
        sup.save(tmp_path / kind)
        assert contents(tmp_path / kind) == contents(stores / kind), kind
        made += 1
    assert made == 10
