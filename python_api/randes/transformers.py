"""``import randes.transformers``: Transformers' own ``from_pretrained`` reads stores, with every fine-tune in them.

    import randes.transformers
    model = AutoModelForCausalLM.from_pretrained("store")
    model.generate(**inputs, adapter_names=["german", "__base__"])
    model.set_adapter("german")

The model is of its own class, with the methods of ``SuperposedModel`` besides.
Raises ``ImportError`` where Transformers is older than 5.20.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer

from randes.checkpoints.huggingface import CUT_LATER, METHOD, base_file, check_version
from randes.checkpoints.quantization import RandesConfig, Served
from randes.checkpoints.sources import Checkpoint
from randes.serving.batch import Batch
from randes.serving.model import SuperposedModel
from randes.superposition.superposition import Superposition

check_version(transformers)
register_quantization_config(METHOD)(RandesConfig)


@register_quantizer(METHOD)
class RandesQuantizer(Served):
    """Has Transformers load a store's base, and puts the fine-tunes into it."""

    store: Path

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the configuration before the weights' files are looked for. Raises ``StoreError`` where it does
        not name one beside it."""
        config.transformers_weights = base_file(vars(self.quantization_config))
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        self.store = Path(checkpoint_files[0]).parent
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Raises ``ValueError`` for a model that Transformers has cut: what serves has to be cut with its layers."""
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise ValueError(f"tp_plan and distributed_config must be left out: {CUT_LATER}")
        super()._process_model_after_weight_loading(model)
        give_adapters(model, SuperposedModel(model, Superposition.load(self.store)))
        return model


class Adapters:
    """Mixed into a model's class: ``adapter_names`` for its calls, and the methods that choose a model."""

    def add_adapter(self, name: str, checkpoint: Checkpoint | None = None) -> None:
        """See ``SuperposedModel.add_adapter``: for models that were deleted, as there is room for no others;
        ``randes.from_pretrained(store, capacity=...)`` has some."""
        served(self).add_adapter(name, checkpoint)

    def delete_adapter(self, name: str, checkpoint: Checkpoint | None = None) -> None:
        """See ``SuperposedModel.delete_adapter``."""
        served(self).delete_adapter(name, checkpoint)

    def active_adapters(self) -> list[str]:
        """See ``SuperposedModel.active_adapters``; a method, as Transformers' models have it."""
        return served(self).active_adapters

    def merge_and_unload(self, name: str | None = None) -> nn.Module:
        """See ``SuperposedModel.merge_and_unload``: this model itself, of its own class again, whose
        ``save_pretrained`` is Transformers'."""
        plain, model = type(self).__bases__[1], served(self).merge_and_unload(name)
        if isinstance(model, Adapters):
            model.__class__ = plain
        del vars(model)["_randes"]
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)
        return model

    def set_adapter(self, name: str) -> None:
        """See ``SuperposedModel.set_adapter``."""
        served(self).set_adapter(name)

    def using(self, names: Sequence[str] | Batch) -> AbstractContextManager[None]:
        """See ``SuperposedModel.using``."""
        return served(self).using(names)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """See ``SuperposedModel.disable_adapter``."""
        return served(self).disable_adapter()

    def generate(self, *args: Any, adapter_names: Sequence[str] | Batch | None = None, **kwargs: Any) -> Any:
        """See ``SuperposedModel.generate``."""
        with served(self).generating(adapter_names, args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return unpickled, (type(self).__bases__[1],), vars(self)  # a class made here is found by no name

    def save_pretrained(self, path: Any, *, shard_size: int | str | None = None, **_: Any) -> None:
        """See ``SuperposedModel.save_pretrained``."""
        served(self).save_pretrained(path, shard_size=shard_size)


def give_adapters(model: PreTrainedModel, wrapper: SuperposedModel) -> None:
    """Make ``model``, whose layers ``wrapper`` has replaced, answer to the names of its fine-tunes."""
    plain: Any = type(model)
    model.__class__ = with_adapters(plain)
    vars(model)["_randes"] = wrapper  # not a submodule: the model is one of the wrapper


@functools.cache
def with_adapters(plain: Any) -> Any:
    """The class of models of ``plain`` that answer to the names of fine-tunes; it has the same name."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, adapter_names: Sequence[str] | Batch | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return plain.forward(self, *args, **kwargs)
        return served(self)(*args, adapter_names=adapter_names, **kwargs)

    return type(plain.__name__, (Adapters, plain), {"forward": forward, "__module__": plain.__module__})


def unpickled(plain: Any) -> Any:
    """A model of that class with nothing in it, for ``pickle`` and ``copy`` to fill."""
    kind = with_adapters(plain)
    return kind.__new__(kind)


def served(model: Any) -> SuperposedModel:
    """The superposed model around a model that was loaded from a store."""
    wrapper: SuperposedModel = vars(model)["_randes"]
    assert isinstance(wrapper, nn.Module)
    return wrapper
