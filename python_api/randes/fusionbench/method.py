"""Our method inside FusionBench: over its model pools, from its command line, for its task pools.

    fusion_bench 'hydra.searchpath=[pkg://randes.fusionbench.config]' method=randes/superposition modelpool=...
    fusion_bench method=randes/superposed_model_soup method._target_=randes.fusionbench.method.SuperposedModelSoup ...

``RandesAlgorithm`` takes the options of ``randes.Config``; the others take the original's keys. Needs fusion-bench.
"""

import copy
from collections.abc import ItemsView, Iterator, ValuesView
from pathlib import Path
from typing import Any, ClassVar

from fusion_bench import BaseAlgorithm, BaseModelPool
from omegaconf import OmegaConf
from torch import nn

from randes.config import Config
from randes.fusionbench import Algorithm, Options, options
from randes.inspect import analysis
from randes.superposition.compress import compress
from randes.superposition.superposition import Superposition


class RetrievedModels(dict[str, nn.Module]):
    """A pool's models by name, each retrieved when it is asked for: a dict, which task pools look through."""

    def __init__(self, pool: BaseModelPool, superposition: Superposition) -> None:
        super().__init__(dict.fromkeys(pool.model_names))
        self._pool, self._superposition = pool, superposition

    def __getitem__(self, name: str) -> nn.Module:
        model = _own(self._pool, name)
        model.load_state_dict(self._superposition.retrieve(name))
        return model

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())  # an own one, without which dict(models) takes what lies inside: nothing

    def pop(self, name: str, *default: Any) -> Any:
        """The model, which is then no longer here."""
        found = self.get(name)
        super().pop(name, *default)
        return default[0] if found is None else found

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (dict.get does not ask __getitem__)

    def items(self) -> ItemsView[str, nn.Module]:  # type: ignore[override]
        return ItemsView(self)

    def values(self) -> ValuesView[nn.Module]:  # type: ignore[override]
        return ValuesView(self)


class RandesAlgorithm(BaseAlgorithm):
    """Superposes the models of a pool, one in memory at a time, and gives them back as FusionBench's own RanDeS does.

    alpha: what retrieved deltas are scaled by. store: a folder to save the superposition to. compare: whether each
    model is compared with its fine-tune. All others are the fields of ``randes.Config``.
    """

    def __init__(self, alpha: float = 1.0, store: str | None = None, compare: bool = False, **config: Any) -> None:
        super().__init__(**{name: config.pop(name) for name in list(config) if name.startswith("_")})
        self.alpha, self.store, self.compare = float(alpha), store, bool(compare)
        self.choices = _plain(config)
        self.options(1)  # what is wrong with them is said before a model is loaded

    def options(self, models: int) -> Options:
        """What will be done with so many models."""
        return Options(Config.from_choices(self.choices).resolved(together=True), self.alpha, False, ())

    def run(self, modelpool: BaseModelPool) -> dict[str, Any]:
        """``models``: the retrieved models by name. ``metadata``: sizes, and comparisons where they were asked for."""
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(models=modelpool)
        config, alpha, _, notes = self.options(len(pool.model_names))
        for note in notes:
            print(f"note: {note}")
        base = _own(pool, "_pretrained_")
        if config.centre or config.rank:  # which need all models at once
            models = {name: pool.load_model(name) for name in pool.model_names}
            superposition = compress(base, models, config, alpha=alpha)
        else:
            superposition = Superposition.create(base, config)
            for name in pool.model_names:
                superposition.add(name, pool.load_model(name), alpha=alpha)
        if self.store is not None:
            superposition.save(Path(self.store))
        metadata: dict[str, Any] = {
            **analysis.storage(superposition).to_dict(),
            "counted_as_fusionbench": analysis.fusionbench_storage(superposition).to_dict(),
            "target_layers": list(superposition.superposed),
        }
        if self.compare:
            metadata["model_retrieval_similarity"] = {
                name: analysis.compare_models(superposition.retrieve(name), pool.load_model(name)).fusionbench()
                for name in pool.model_names
            }
        return {"models": RetrievedModels(pool, superposition), "metadata": metadata}


class _Translated(RandesAlgorithm):
    """With the keys of one of FusionBench's own methods."""

    algorithm: ClassVar[Algorithm]

    def options(self, models: int) -> Options:
        return options({"name": self.algorithm, **self.choices}, models)


class SuperposedModelSoup(_Translated):
    """For ``SuperposedModelSoupAlgorithm``, with its configuration."""

    algorithm = "superposed_model_soup"


class SuperposedTaskArithmetic(_Translated):
    """For ``SuperposedTaskArithmeticAlgorithm``, with its configuration."""

    algorithm = "superposed_task_arithmetic"


def _own(pool: BaseModelPool, name: str) -> nn.Module:
    """A model to write to: pools that hold modules give out those themselves."""
    model: nn.Module = pool.load_model(name)
    return copy.deepcopy(model) if pool.has_instance_models else model


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without OmegaConf's containers."""
    return {
        name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for name, value in values.items()
    }
