"""Likeness of tensors and models, against the definitions in plain torch; sizes, against files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import randes
from randes import fusionbench
from randes.checkpoints.sources import write_file
from randes.errors import CheckpointError
from randes.inspect import analysis


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int) -> Tensor:
    """A matrix whose singular values are 0.9ⁿ."""
    left = torch.linalg.qr(seeded(rows, columns, seed=1).double())[0]
    right = torch.linalg.qr(seeded(columns, columns, seed=2).double())[0]
    return (left * 0.9 ** torch.arange(columns)) @ right.mT


def vector(model: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.values()])


@pytest.fixture
def models() -> dict[str, dict[str, Tensor]]:
    shapes = {"layers.0.w": (37, 19), "layers.1.w": (37, 19), "b": (19,), "scalar": ()}
    return {
        str(j): {name: seeded(*shape, seed=j * 7 + n) for n, (name, shape) in enumerate(shapes.items())}
        for j in range(4)
    }


def test_cosine_similarity_is_that_of_vectors() -> None:
    a, b = seeded(5, 7), seeded(5, 7, seed=1)
    expected = torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0)
    assert analysis.cosine_similarity(a, b) == pytest.approx(float(expected), abs=1e-12)
    assert analysis.cosine_similarity(a, a.bfloat16().float() * -3) == pytest.approx(-1, abs=1e-4)
    assert analysis.cosine_similarity(a, torch.zeros_like(a)) == 0.0
    with pytest.raises(ValueError, match=r"second must be of shape \(5, 7\), got \(7, 5\)"):
        analysis.cosine_similarity(a, b.mT)


def test_pairwise_cosines_are_those_of_each_pair(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    tensors = [model["layers.0.w"] for model in models.values()]
    tensors.append(torch.zeros_like(tensors[0]))
    found = analysis.pairwise_cosines(tensors)
    expected = [[analysis.cosine_similarity(a, b) for b in tensors] for a in tensors]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    # Models: as one vector, whether they are in memory or on the disk.
    write_file(tmp_path / "0.safetensors", models["0"])
    whole = analysis.pairwise_cosines({**models, "0": tmp_path / "0.safetensors"})
    vectors = torch.stack([vector(model) for model in models.values()])
    vectors /= vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(whole, vectors @ vectors.mT, rtol=0, atol=1e-12)
    some = analysis.pairwise_cosines(models, ["b"])
    torch.testing.assert_close(some, analysis.pairwise_cosines([model["b"] for model in models.values()]))


def test_pairwise_cosines_in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [seeded(300, 40, seed=j) for j in range(3)]
    whole = analysis.pairwise_cosines(tensors)
    monkeypatch.setattr("randes.checkpoints.lazy_tensors.CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr("randes.inspect.analysis.likeness.AT_A_TIME", 77)
    torch.testing.assert_close(analysis.pairwise_cosines(tensors), whole, rtol=0, atol=1e-14)


def test_models_that_do_not_fit_are_refused(models: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match="at least one tensor or model"):
        analysis.pairwise_cosines([])
    with pytest.raises(ValueError, match="tensors must be of shape"):
        analysis.pairwise_cosines([seeded(2, 2), seeded(2, 3)])
    with pytest.raises(ValueError, match="names must be of tensors that the models have, got 'head'"):
        analysis.pairwise_cosines(models, ["head"])
    with pytest.raises(ValueError, match="names must hold at least one"):
        analysis.compare_models(models["0"], models["0"], [])
    with pytest.raises(CheckpointError, match="missing from the checkpoint"):
        analysis.compare_models(models["0"], {"b": models["0"]["b"]})


def test_models_are_compared_by_tensor_and_in_total(models: dict[str, dict[str, Tensor]]) -> None:
    first, second = models["0"], {name: value + 0.3 * models["1"][name] for name, value in models["0"].items()}
    found = analysis.compare_models(first, second)
    for name, value in first.items():
        own = found.tensors[name]
        assert own.l2 == pytest.approx(float((value.double() - second[name].double()).norm()), rel=1e-12)
        assert own.cosine == pytest.approx(analysis.cosine_similarity(value, second[name]), abs=1e-12)
        assert own.elements == value.numel()
    a, b = vector(first), vector(second)
    assert found.total.l2 == pytest.approx(float((a - b).norm()), rel=1e-12)
    assert found.total.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-12)
    assert found.layers().keys() == {"layers.0", "layers.1", "b", "scalar"}
    assert found.layers()["layers.1"] == found.tensors["layers.1.w"].cosine
    only = analysis.compare_models(first, second, ["b"])
    assert only.total == only.tensors["b"] == found.tensors["b"]


def test_near_models_are_told_apart() -> None:
    """‖a − b‖ of models a millionth apart: from a·a, b·b and a·b alone it would be lost."""
    a = {"w": seeded(64, 64).double()}
    b = {"w": a["w"] + 1e-9}
    assert analysis.compare_models(a, b).total.l2 == pytest.approx(64e-9, rel=1e-3)


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (7, 7)])
def test_the_partition_is_the_decomposition(shape: tuple[int, int]) -> None:
    matrix = seeded(*shape)
    chunks = analysis.svd_partition(matrix, 3)
    width = min(shape) // 3
    assert [len(chunk.s) for chunk in chunks] == [width, width, min(shape) - 2 * width]
    torch.testing.assert_close(torch.cat([chunk.s for chunk in chunks]), torch.linalg.svdvals(matrix))
    torch.testing.assert_close(sum((c.u * c.s) @ c.v.mT for c in chunks), matrix, rtol=0, atol=1e-5)


def test_the_loudest_directions_are_found_without_the_others() -> None:
    matrix = decaying(300, 200)
    exact = torch.linalg.svdvals(matrix)[:24]
    chunks = analysis.svd_partition(matrix, 3, directions=24)
    torch.testing.assert_close(torch.cat([chunk.s for chunk in chunks]), exact, rtol=1e-4, atol=0)
    again = analysis.svd_partition(matrix, 3, directions=24)
    assert all(
        torch.equal(a, b) for one, other in zip(chunks, again, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("directions", [None, 30])
def test_subspace_similarity_is_its_definition(directions: int | None) -> None:
    reference = decaying(90, 60)
    other = reference + 0.05 * seeded(90, 60, seed=3).double()
    found = analysis.subspace_similarity(reference, other, 3, directions=directions)
    for (u, _, v), own in zip(analysis.svd_partition(reference, 3, directions=directions), found, strict=True):
        projected = u @ u.mT @ other @ v @ v.mT
        assert own.cosine == pytest.approx(analysis.cosine_similarity(reference, projected), abs=1e-5)
        assert own.distance == pytest.approx(float((reference - projected).norm()), rel=1e-5)
    assert sum(own.cosine**2 for own in analysis.subspace_similarity(reference, reference)) == pytest.approx(1)


def test_partitions_that_cannot_be_are_refused() -> None:
    for arguments, message in (
        ({"chunks": 9}, "chunks must be from 1 to 8, got 9"),
        ({"directions": 9}, "directions must be from 1 to 8, got 9"),
        ({"directions": 0}, "directions must be from 1 to 8, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            analysis.svd_partition(seeded(8, 10), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrix must have 2 dimensions"):
        analysis.svd_partition(seeded(8))
    with pytest.raises(ValueError, match="other must be of shape"):
        analysis.subspace_similarity(seeded(8, 8), seeded(8, 9))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = nn.Linear(128, 64), nn.LayerNorm(64)


def superposed(**options: object) -> randes.Superposition:
    torch.manual_seed(0)
    superposition = randes.Superposition.create(Net(), randes.Config(**options))  # type: ignore[arg-type]
    for name in ("a", "b", "c"):
        superposition.add(name, Net())
    return superposition


def test_storage_counts_what_a_store_holds(tmp_path: Path) -> None:
    superposition = superposed()
    superposition.save(tmp_path / "store")
    found = analysis.storage(superposition)
    numbers = 128 * 64 + 3 * 64
    assert found.model_numbers == numbers
    assert found.model_bytes == numbers * 4
    # The base, D, and of each model its bias and one gain. (A new norm is like any other.)
    assert found.numbers == numbers + 128 * 64 + 3 * 64 + 3
    assert found.context_numbers == 3
    in_files = sum(file.stat().st_size for file in (tmp_path / "store").glob("*.safetensors"))
    assert found.nbytes == pytest.approx(in_files, rel=0.2)
    packed = analysis.storage(superposition.pack(4))
    assert packed.numbers == found.numbers + 64 * 2  # two groups of steps a row
    assert packed.nbytes < found.nbytes


def test_storage_as_fusionbench_counts_it() -> None:
    numbers = 128 * 64 + 3 * 64
    deltas = analysis.fusionbench_storage(superposed(signs="columns"))
    assert deltas.context_numbers == 3 * 128
    assert deltas.numbers == numbers + 128 * 64 + 3 * 128
    assert deltas.nbytes == 4 * (numbers + 128 * 64) + 3 * 128
    plain = analysis.fusionbench_storage(superposed(signs="none"))
    assert plain.numbers == numbers
    assert plain.nbytes == 4 * numbers


# -------------------------------------------------------------------- retrieved models


def of_finetunes(**options: object) -> tuple[randes.Superposition, dict[str, Net]]:
    torch.manual_seed(0)
    base = Net()
    models = {}
    for name in ("a", "b", "c"):
        models[name] = Net()
        models[name].load_state_dict(
            {key: value + 0.1 * torch.randn_like(value) for key, value in base.state_dict().items()}
        )
    superposition = randes.Superposition.create(base, randes.Config(**options))  # type: ignore[arg-type]
    for name, model in models.items():
        superposition.add(name, model)
    return superposition, models


def test_retrieval_is_the_likeness_of_what_comes_back() -> None:
    superposition, models = of_finetunes()
    found = analysis.retrieval(superposition, "b", models["b"])
    back, tuned = (
        superposition.retrieve("b"),
        {name: value.detach() for name, value in models["b"].state_dict().items()},
    )
    assert found.weights.l2 == pytest.approx(float((vector(back) - vector(tuned)).norm()), rel=1e-9)
    origin = superposition.base["mlp.weight"]
    deltas = back["mlp.weight"] - origin, tuned["mlp.weight"] - origin
    assert found.deltas.tensors.keys() == {"mlp.weight"}
    assert found.deltas.total.cosine == pytest.approx(analysis.cosine_similarity(*deltas), abs=1e-6)
    assert found.deltas.total.cosine == pytest.approx(3**-0.5, abs=0.05)
    thirds = [own.cosine for own in analysis.subspace_similarity(deltas[1], deltas[0])]
    assert found.subspaces == pytest.approx(thirds, abs=1e-5)
    assert found.sampled == 1
    with pytest.raises(CheckpointError, match="this is not the checkpoint that was added as 'b'"):
        analysis.retrieval(superposition, "b", models["a"])


def test_decorrelation_is_of_deltas_before_and_after() -> None:
    superposition, models = of_finetunes(signs="columns")
    before, after = analysis.decorrelation(superposition, models)
    origin = superposition.base["mlp.weight"]
    deltas = [model.mlp.weight.detach() - origin for model in models.values()]
    torch.testing.assert_close(before.values, analysis.pairwise_cosines(deltas), rtol=0, atol=1e-6)
    turned = [
        delta * fusionbench.matrix(superposition, name, "mlp.weight")
        for name, delta in zip(models, deltas, strict=True)
    ]
    torch.testing.assert_close(after.values, analysis.pairwise_cosines(turned), rtol=0, atol=1e-6)
    with pytest.raises(randes.UnknownModelError):
        analysis.decorrelation(superposition, {"d": models["a"]})
