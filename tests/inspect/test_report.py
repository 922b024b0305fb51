"""The report: its numbers are the store's, and its page stands alone."""

import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from models import TRANSFORMS, finetune, linear, net, superposed
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import randes
from randes.cli import app
from randes.inspect import analysis, report
from randes.inspect.report import cosines, pictures
from randes.superposition.summary import verify
from randes_kernels import reference, tensor_id

Row = list[tuple[str, str]]


class Page(HTMLParser):
    """Tables by id: rows of (shown, exact); and every tag with its attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tables: dict[str, list[Row]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._row: Row | None = None
        self._cell: list[str] | None = None
        self._exact = ""
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = self.tables.setdefault(str(dict(attrs)["id"]), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell, self._exact = [], dict(attrs).get("title") or ""

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self._rows[-1].append(("".join(self._cell), self._exact))
            self._cell = None

    def exact(self, table: str) -> dict[str, dict[str, float]]:
        """The numbers of a table by row and column."""
        head, *rows = self.tables[table]
        columns = [shown for shown, _ in head[1:]]
        return {
            row[0][0]: {name: float(exact) for name, (_, exact) in zip(columns, row[1:], strict=True) if _number(exact)}
            for row in rows
        }


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def written(sup: randes.Superposition, folder: Path, models: dict[str, nn.Module] | None = None) -> Page:
    """A page without its pictures, which take most of the time."""
    with patch.object(pictures, "heat", return_value="<svg></svg>"), patch.object(pictures, "bars", return_value=""):
        report.write(sup, folder / "page.html", models)
    return Page(folder / "page.html")


def deltas(sup: randes.Superposition, model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict()
    return {name: own[name].double() - sup.base[name].double() for name in sup.superposed}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_sizes_are_those_of_the_store_and_of_packing_it(tmp_path: Path) -> None:
    base = net()
    models = {f"m{seed}": finetune(base, seed) for seed in range(3)}
    for config in (randes.Config(group_size=2), randes.Config(rank=4)):
        sup = randes.compress(base, models, config)
        for held in (sup, sup.pack(4)):
            rows = written(held, tmp_path).exact("sizes")
            named = {"this store, packed in 4 bits" if held.packing else "this store": held.sizes}
            named |= {
                f"packed in {b} bit{'s' * (b > 1)}": sup.pack(b).sizes
                for b in (8, 4, 2, 1, 0.5)
                if not (held.packing and b == 4)
            }
            assert rows.keys() - {"3 separate models"} == named.keys()
            for label, sizes in named.items():
                assert rows[label]["base"] == sizes.base
                assert rows[label]["superposed"] == sizes.superposed
                assert rows[label]["kept per model"] == sizes.kept
                assert rows[label]["basis and coordinates"] == sizes.basis
                assert rows[label]["total"] == sizes.total
            assert rows["3 separate models"]["total"] == sup.sizes.separate_models


@pytest.mark.parametrize("transform", ["both", "none", "everything"])
def test_cosines_before_and_after_are_those_of_the_reference(tmp_path: Path, transform: str) -> None:
    base = net()
    sup, tuned = superposed(base, 3, TRANSFORMS[transform])
    tuned["close"] = finetune(base, 0, 0.06)  # points where m0 does
    sup.add("close", tuned["close"])
    page = written(sup, tmp_path, tuned)
    before, after = page.exact("before"), page.exact("after")
    lying = {}
    for name, model in tuned.items():
        lying[name] = {}
        for tensor, delta in deltas(sup, model).items():
            rows, columns, target = reference.transform_parts(
                sup.key(name), tensor_id(tensor), delta.shape, sup.config.transform
            )
            turned = torch.zeros_like(delta).index_copy_(1, target, rows[:, None] * delta * columns)
            lying[name][sup.place(name, tensor)] = turned
    for one, first in tuned.items():
        for other, second in tuned.items():
            own = cosine(flat(deltas(sup, first)), flat(deltas(sup, second)))
            assert before[one][other] == pytest.approx(own, abs=1e-9)
            assert after[one][other] == pytest.approx(cosine(flat(lying[one]), flat(lying[other])), abs=1e-9)
    assert before["m0"]["close"] > 0.99
    assert (abs(after["m0"]["close"]) < 0.2) == (transform != "none")
    assert "retrieved" not in page.tables


@pytest.mark.parametrize("kind", ["plain", "everything", "packed", "rank", "packed rank"])
def test_without_checkpoints_the_cosines_are_of_what_comes_back(tmp_path: Path, kind: str) -> None:
    base = net()
    models = {f"m{seed}": finetune(base, seed) for seed in range(3)}
    config = TRANSFORMS["everything"] if kind == "everything" else randes.Config(rank=4 if "rank" in kind else 0)
    sup = randes.compress(base, models, config)
    sup = sup.pack(4) if "packed" in kind else sup
    page = written(sup, tmp_path)
    found = page.exact("retrieved")
    back = {}
    for name in sup.names:
        retrieved = sup.retrieved(name)
        back[name] = flat({tensor: retrieved.delta(tensor).double() for tensor in sup.superposed})
    for one in sup.names:
        for other in sup.names:
            assert found[one][other] == pytest.approx(cosine(back[one], back[other]), abs=1e-5)
    assert "not</b> the cosines of the original deltas" in page.text
    assert "before" not in page.tables
    assert "Measured: needs checkpoints" in page.text


@pytest.mark.parametrize("kind", ["plain", "packed", "centred rank", "alpha"])
def test_errors_are_those_that_verify_finds_and_predicts(tmp_path: Path, kind: str) -> None:
    base = net()
    models = {f"m{seed}": finetune(base, seed) for seed in range(3)}
    ranked = randes.Config(centre=True, rank=4) if kind == "centred rank" else randes.Config()
    sup = randes.compress(base, models, ranked)
    if kind == "alpha":
        models["half"] = finetune(base, 3)
        sup.add("half", models["half"], alpha=0.5)
    sup = sup.pack(2) if kind == "packed" else sup
    page = written(sup, tmp_path, models)
    for name, model in models.items():
        found, row = verify(sup, name, model), page.exact("models")[name]
        assert row["measured error"] == pytest.approx(found.relative_error, rel=1e-12)
        assert row["predicted error"] == pytest.approx(found.predicted_error, rel=1e-12)
        measured = page.exact("measured")[name]
        assert measured.keys() == {"layers.0", "layers.1", "layers.2"}
        own = {tensor: float(delta.square().sum()) for tensor, delta in deltas(sup, model).items()}
        for layer, value in measured.items():
            inside = [tensor for tensor in own if tensor.startswith(f"{layer}.")]
            error = sum(found.tensors[tensor] ** 2 * own[tensor] for tensor in inside)
            assert value == pytest.approx(math.sqrt(error / sum(own[tensor] for tensor in inside)), rel=1e-3)
        energy = sum(page.exact("energy")[name].values())
        if not sup.config.rank:
            assert energy == pytest.approx(sum(own.values()), rel=1e-6)
        else:
            assert 0 < energy < sum(own.values())
    assert page.tables["config"][-1][1][0].startswith("2 bits" if kind == "packed" else "no")


def test_retrieved_models_are_beside_their_fine_tunes(tmp_path: Path) -> None:
    sup, models = superposed(net(), 3)
    page = written(sup, tmp_path, models)
    found = page.exact("retrieval")
    assert list(found) == sup.names
    for name, model in models.items():
        near = analysis.retrieval(sup, name, model)
        assert found[name]["cosine of weights"] == near.weights.cosine
        assert found[name]["cosine of deltas"] == near.deltas.total.cosine
        assert (
            tuple(found[name][third] for third in ("louder third", "middle third", "quieter third")) == near.subspaces
        )
        layers = page.exact("retrieval-layers")[name]
        assert layers == near.deltas.layers()
    counted = page.exact("storage")
    counts = {"this store": analysis.storage(sup), "as FusionBench counts": analysis.fusionbench_storage(sup)}
    for column, own in counts.items():
        assert {name: row[column] for name, row in counted.items()} == own.to_dict()
    assert "retrieval" not in written(sup, tmp_path).tables


def test_it_says_what_is_kept_and_why(tmp_path: Path) -> None:
    base = {
        "h.0.weight": torch.randn(32, 32), "h.1.weight": torch.randn(32, 32), "h.0.bias": torch.randn(32),
        "head.weight": torch.randn(5, 32), "embed.weight": torch.randn(40, 32), "table": torch.randn(32, 32),
        "mask.weight": torch.ones(32, 32, dtype=torch.int64),
    }  # fmt: skip
    sup = randes.Superposition.create(base)
    moved = {name: value + torch.ones((), dtype=value.dtype) for name, value in base.items() if name != "table"}
    sup.add("a", moved | {"table": base["table"]})
    sup.add("b", base)
    page = written(sup, tmp_path)
    rows = {row[0][0]: row[1:] for row in page.tables["kept"][1:]}
    assert {name: row[4][0] for name, row in rows.items()} == {
        "h.*.bias": "not a matrix",
        "head.weight": "narrower than min_width (32)",
        "embed.weight": "a small table of embeddings",
        "table": "not matched by include (*weight, *experts.*proj)",
        "mask.weight": "dtype int64",
    }
    assert rows["table"][3][0] == "shared with the base"
    assert rows["embed.weight"][3][0] == "kept per model"
    assert [exact for _, exact in rows["embed.weight"][5:]] == ["1", str(40 * 32 * 4), str(40 * 32 * 4)]
    assert sum(float(row[-1][1]) for row in rows.values()) == sup.sizes.kept
    superposed = {row[0][0]: row[1:] for row in page.tables["superposed"][1:]}
    assert [shown for shown, _ in superposed["h.*.weight"][:2]] == ["2", "32×32"]
    assert float(superposed["h.*.weight"][-1][1]) == sup.sizes.superposed


def test_names_are_text_and_the_page_stands_alone(tmp_path: Path) -> None:
    base = {'x"><i>0</i>.weight': torch.randn(32, 32), "y.0.weight": torch.randn(32, 32)}
    sup = randes.Superposition.create(base)
    names = ["<b>", "a$x^2$", "</svg><script>alert(1)</script>", "多行", "'&amp;", "n" * 200]
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        sup.add(name, {key: value + torch.randn(32, 32, generator=generator) for key, value in base.items()})
    report.write(sup, tmp_path / "page.html", title="<u>store</u>")
    page = Page(tmp_path / "page.html")
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "i", "u", "link", "iframe"}
    assert {row[0][0] for row in page.tables["models"][1:]} == {*names}
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "data:image/png").startswith(("data:image/png", "#"))
    assert "http" not in page.text.replace("http://www.w3.org/", "")
    assert 'aria-label="Sizes"' in page.text
    assert "currentColor" in page.text
    assert "\\math" not in page.text


def test_pictures_name_layers_by_what_tells_them_apart() -> None:
    from randes.inspect.report.page import _endings

    assert _endings(["lm_head.weight", "model.layers.0", "model.layers.1"]) == [
        "lm_head.weight",
        "layers.0",
        "layers.1",
    ]
    assert _endings(["net.a.conv.weight", "net.b.conv.weight"]) == ["a", "b"]
    assert _endings(["a.b", "a.b.c"]) == ["b", "b.c"]
    assert _endings(["enc.layers.0", "dec.layers.0"]) == ["enc", "dec"]
    assert len(pictures.short("n" * 300)) == pictures.LABEL
    assert [pictures.figures(value) for value in (0.0, 2.6458, 0.0312, -0.0004, 512.3, 2e6)] == [
        "0.00", "2.65", ".031", "-4e-4", "512", "2e6",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 40])
def test_any_number_of_models(tmp_path: Path, count: int) -> None:
    sup, _ = superposed(linear(32, 32), count)
    report.write(sup, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.text.count("<svg") == (1 if count == 0 else 2 if count == 1 else 3)
    assert len(page.tables["models"]) == count + 1
    assert ("retrieved" in page.tables) == (count > 1)
    assert len(page.text) < 400_000


def test_large_tensors_are_sampled_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"big.weight": torch.zeros(512, 256), "small.weight": torch.zeros(32, 32)}
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(512, 256, generator=generator)
    sup = randes.Superposition.create(base)
    models: dict[str, dict[str, Tensor]] = {}
    for name in ("a", "b"):
        own = torch.randn(512, 256, generator=generator)
        models[name] = {"big.weight": common + own, "small.weight": torch.randn(32, 32, generator=generator)}
        sup.add(name, models[name])
    monkeypatch.setattr("randes.checkpoints.lazy_tensors.CHUNK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(cosines, "SAMPLE", 1 << 15)
    report.write(sup, tmp_path / "page.html", models)
    page = Page(tmp_path / "page.html")
    assert "1 of 2 tensors have more than" in page.text
    exact = cosine(flat({k: v.double() for k, v in models["a"].items()}), flat(models["b"]).double())
    found = page.exact("before")["a"]["b"]
    assert found == pytest.approx(exact, abs=0.03)
    assert found != pytest.approx(exact, abs=1e-9)


def test_bad_input_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sup, tuned = superposed(net(), 2)
    page = tmp_path / "page.html"
    page.write_text("before")
    with pytest.raises(randes.UnknownModelError, match="no model is called 'x'; there are: m0, m1"):
        report.write(sup, page, {"x": tuned["m0"]})
    with pytest.raises(randes.CheckpointError, match="not the checkpoint that was added as 'm0'"):
        report.write(sup, page, {"m0": tuned["m1"], "m1": tuned["m1"]})
    with pytest.raises(ValueError, match=r"must end in \.html, got .*manifest\.json"):
        report.write(sup, tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="a folder that is there"):
        report.write(sup, tmp_path / "absent" / "page.html")
    for module in ("randes.inspect.report.page", "randes.inspect.report.pictures"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr(report, "pictures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(randes.RandesError, match=r"needs matplotlib: python -m pip install 'randes\[report\]'"):
        report.write(sup, page)
    assert page.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_the_command(tmp_path: Path) -> None:
    sup, tuned = superposed(net(), 2)
    sup.save(tmp_path / "store")
    named = []
    for name, model in tuned.items():
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        named += ["--model", f"{name}={tmp_path}/{name}.safetensors"]
    out = ["--out", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, ["report", str(tmp_path / "store"), *out, *named])
    assert result.exit_code == 0, result.output
    page = Page(tmp_path / "page.html")
    assert page.exact("sizes")["this store"]["total"] == sup.nbytes
    assert page.exact("models")["m1"]["measured error"] == verify(sup, "m1", tuned["m1"]).relative_error
    assert result.stdout.strip().endswith("page.html: 2 models, 2 checkpoints compared")
    wrong = ["--model", f"m0={tmp_path}/m1.safetensors"]
    result = CliRunner().invoke(app, ["report", str(tmp_path / "store"), *out, *wrong])
    assert result.exit_code == 2
    assert "error: this is not the checkpoint that was added as 'm0'" in result.stderr


def test_the_page_begins_with_a_verdict(tmp_path: Path) -> None:
    base = net()
    models = {f"m{number}": finetune(base, number) for number in range(3)}
    sup = randes.compress(base, models, rank=0)
    two = sup.pack(2)
    for store, given in ((sup, models), (two, {})):
        randes.report.write(store, tmp_path / "page.html", given)
        page = (tmp_path / "page.html").read_text("utf-8")
        verdict = page[page.index("<ul id='verdict'>") : page.index("How it was made")]
        assert f"{store.nbytes / store.sizes.base:.2f} times one model." in verdict
        assert "times a delta's size in the mean, most in m" in verdict
        assert "Wrong" not in verdict
        later = f"{two.nbytes / sup.sizes.base:.2f} times one model of this"
        assert (later in verdict) is (store is sup), "what packing would make of it is what it makes"
        assert ("<div class='pair'><div><h3>Before" in page) is bool(given)
        assert "of each model, a row, in each layer, a column" in page
    randes.report.write(randes.Superposition.create(base), tmp_path / "page.html")
    assert "add a fine-tune" in (tmp_path / "page.html").read_text("utf-8")
