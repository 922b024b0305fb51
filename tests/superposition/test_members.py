"""What scales a model's numbers is finite in fp32, or it is refused by name: from a manifest, and from a caller."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import finetune, net
from typer.testing import CliRunner

import randes
from randes.checkpoints.sources import write_file
from randes.cli import app
from randes.superposition.store.manifest import MANIFEST, _checksum, text_of

TENSOR = "layers.0.up.weight"
BAD = [float("nan"), float("inf"), float("-inf"), 1e308, 10**400, "1", None, True]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    base = net()
    sup = randes.compress(base, {"m0": finetune(base, 0), "m1": finetune(base, 1)}, randes.Config(rank=6))
    sup.save(tmp_path / "store")
    return tmp_path / "store"


def rewritten(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The manifest with something else in it, and a checksum that is right for that."""
    manifest = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    manifest["checksum"] = _checksum(manifest)
    (store / MANIFEST).write_text(text_of(manifest), encoding="utf-8")


def refused(store: Path, match: str) -> None:
    with pytest.raises(randes.StoreError, match=match):
        randes.Superposition.load(store, check=False)


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:9])
def test_a_manifest_whose_numbers_are_no_scales_is_refused(store: Path, value: object) -> None:
    fine = (store / MANIFEST).read_bytes()
    for key, what in (("alpha", "alpha"), ("gains", f"gain of {TENSOR}"), ("units", f"unit of {TENSOR}")):

        def change(manifest: dict[str, Any], key: str = key) -> None:
            record = manifest["models"]["m1"]
            record.update({key: value}) if key == "alpha" else record[key].update({TENSOR: value})

        rewritten(store, change)
        refused(
            store, rf"{what} of model 'm1' must be a finite number in fp32.*, got {str(value)[:3]!r}".replace("'", "'?")
        )
        (store / MANIFEST).write_bytes(fine)
    rewritten(store, lambda manifest: manifest["models"]["m1"].update(alphas={TENSOR: value}))
    refused(store, f"alpha of {TENSOR} of model 'm1' must be a finite number in fp32, got")


@pytest.mark.parametrize("value", [-1.0, 0, -0.0, 1e-300])
def test_gains_are_above_zero(store: Path, value: float) -> None:
    rewritten(store, lambda manifest: manifest["models"]["m1"]["gains"].update({TENSOR: value}))
    refused(store, f"gain of {TENSOR} of model 'm1' must be a finite number in fp32 above 0, got {value!r}")


@pytest.mark.parametrize("value", [-1.0, 0])
def test_units_are_above_zero(store: Path, value: float) -> None:
    rewritten(store, lambda manifest: manifest["models"]["m1"]["units"].update({TENSOR: value}))
    refused(store, f"unit of {TENSOR} of model 'm1' must be a finite number in fp32 above 0, got {value!r}")


def test_products_that_overflow_are_refused(store: Path) -> None:
    rewritten(
        store,
        lambda manifest: (
            manifest["models"]["m0"].update(alpha=1e30) or manifest["models"]["m0"]["gains"].update({TENSOR: 1e20})
        ),
    )
    refused(store, f"alpha · gain of {TENSOR} of model 'm0' must be below 5.3e[+]36, got 1e[+]50")


@pytest.mark.parametrize("group", [-1, 0.0, float("nan"), "0"])
def test_a_group_is_a_number_of_one(store: Path, group: object) -> None:
    rewritten(store, lambda manifest: manifest["models"]["m0"].update(group=group))
    refused(store, "group of model 'm0' must be an integer of at least 0, got")


def test_other_values_of_a_manifest_are_a_stores_error(store: Path) -> None:
    fine = (store / MANIFEST).read_bytes()
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda manifest: manifest["config"].update(group_size=float("nan")),
        lambda manifest: manifest["config"].update(unheard_of=1),
        lambda manifest: manifest["models"]["m0"].update(unheard_of=1),
        lambda manifest: manifest["models"]["m0"].update(gains=[1.0]),
        lambda manifest: manifest["models"].update(m0=None),
        lambda manifest: manifest.update(packed={"bits": 3, "group": 64, "coordinates": 16, "master": ""}),
        lambda manifest: manifest.update(packed={"bits": float("nan"), "group": 64, "coordinates": 16, "master": ""}),
        lambda manifest: manifest.update(packed={"bits": 4, "group": 64, "coordinates": 2, "master": ""}),
    ]
    for change in changes:
        rewritten(store, lambda manifest, change=change: change(manifest) and None)
        refused(store, "cannot be used")
        (store / MANIFEST).write_bytes(fine)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1e39, 1e308])
def test_an_alpha_that_is_not_finite_in_fp32_is_refused_before_anything_is_changed(alpha: float) -> None:
    base = net()
    models = {"m0": finetune(base, 0)}
    with pytest.raises(ValueError, match="alpha must be a finite number in fp32, got"):
        randes.compress(base, models, alpha=alpha)
    sup = randes.Superposition.create(base)
    with pytest.raises(ValueError, match="alpha must be a finite number in fp32, got"):
        sup.add("m0", models["m0"], alpha=alpha)
    assert not sup.members
    assert not sup.deltas


def test_an_alpha_that_is_too_large_for_its_delta_is_refused_before_anything_is_changed() -> None:
    base = net()
    sup = randes.Superposition.create(base)
    loud = finetune(base, 0, 1e10)
    with pytest.raises(ValueError, match=r"alpha · gain of .* of model 'm0' must be below"):
        sup.add("m0", loud, alpha=1e30)
    assert not sup.members
    assert not sup.deltas
    with pytest.raises(ValueError, match=r"alpha · gain of .* of model 'm0' must be below"):
        randes.compress(base, {"m0": loud}, randes.Config(), alpha=1e30)


@pytest.mark.parametrize("alpha", ["nan", "inf", "1e308"])
def test_the_command_line_refuses_the_same(store: Path, alpha: str) -> None:
    base, folder = net(), store.parent
    write_file(folder / "base.safetensors", base.state_dict())
    write_file(folder / "m2.safetensors", finetune(base, 2).state_dict())
    before = (store / MANIFEST).read_bytes()
    model = f"m2={folder / 'm2.safetensors'}"
    compressing = [
        "compress",
        "--base",
        str(folder / "base.safetensors"),
        "--model",
        model,
        "--out",
        str(folder / "new"),
    ]
    for arguments in (["add", str(store), model], compressing):
        found = CliRunner().invoke(app, [*arguments, "--alpha", alpha])
        assert found.exit_code == 2
        assert "alpha must be a finite number in fp32" in found.output
    assert (store / MANIFEST).read_bytes() == before
    assert not (folder / "new" / MANIFEST).exists()


def test_a_model_turned_around_and_one_of_nothing_are_models(tmp_path: Path) -> None:
    base = net()
    sup = randes.Superposition.create(base)
    sup.add("m0", finetune(base, 0), alpha=-1)
    sup.add("m1", finetune(base, 1), alpha=0)
    sup.save(tmp_path)
    assert randes.Superposition.load(tmp_path).member("m0").alpha == -1


def unlisted(manifest: dict[str, Any], stem: str) -> None:
    del manifest["files"][next(name for name in manifest["files"] if name.startswith(stem))]


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no model's file": (lambda found: unlisted(found, "model-"), "model 'm[01]' must have its own values of"),
    "no group's file": (lambda found: unlisted(found, "group-0"), "must have a superposition in group 0 of"),
    "another group": (lambda found: found["models"]["m0"].update(group=3), "must have a superposition in group 3 of"),
    "another name": (lambda found: found["models"].update(z=found["models"].pop("m0")), "is the file of no model"),
    "another seed": (lambda found: found["config"].update(seed=7), "is the file of no model"),
    "a gain of nothing": (
        lambda found: found["models"]["m0"]["gains"].update(nothing=1.0), "must have a superposed delta of nothing",
    ),
    "other bits": (lambda found: found["packed"].update(bits=2), "columns in 2 bits must have"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_does_not_go_with_its_files_is_refused(lie: str, tmp_path: Path) -> None:
    base = net()
    sup = randes.Superposition.create(base)
    for number in range(2):
        sup.add(f"m{number}", finetune(base, number))
    (sup.pack(4) if lie == "other bits" else sup).save(tmp_path)
    change, said = LIES[lie]
    rewritten(tmp_path, change)
    refused(tmp_path, f"manifest.json cannot be used: .*{said}")
