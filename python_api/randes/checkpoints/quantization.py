"""What Transformers holds of a model over a store: that it is no plain one, and that its weights are not to be saved.

Transformers is imported here; only its own models need it.
"""

from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from randes.checkpoints.huggingface import METHOD, check_one_device

BASE_ALONE = f"{METHOD}-base"


class RandesConfig(QuantizationConfigMixin):
    """What a store's config.json says of its weights. base: the file of the base's, beside it; "" for a model that
    was not loaded from one."""

    def __init__(self, base: Any = "", **_: Any) -> None:
        self.quant_method, self.base = METHOD, base


@register_quantization_config(BASE_ALONE)
class BaseConfig(RandesConfig):
    """The same, to load a store's base alone, as a plain model."""

    dequantize = True

    def __init__(self, base: str, **_: Any) -> None:
        self.quant_method, self.base = BASE_ALONE, base


class Served(HfQuantizer):
    """Held by a model that serves many, so that Transformers' ``save_pretrained`` refuses to write the base as it."""

    def is_serializable(self) -> bool:
        """Not by Transformers: ``Superposition.save`` and ``SuperposedModel.save_pretrained`` write stores."""
        return False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called with the ``device_map`` before anything is loaded, and with what "auto" has become. Raises
        ``ValueError`` for several devices."""
        super().validate_environment(*args, device_map=device_map, **kwargs)
        check_one_device(device_map)

    def update_weight_conversions(self, conversions: Any, *_: Any) -> list[Any]:
        """None: a store's tensors have the names that the model has."""
        return []

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        vars(model).pop("_weight_conversions", None)  # what it is saved with is its class's own
        return model

    @property
    def is_trainable(self) -> bool:
        """A superposition is not trained."""
        return False

    @property
    def is_qat_trainable(self) -> bool:
        """Asked by a ``Trainer`` alone, when it is made: raises ``ValueError`` that says what to train instead."""
        raise ValueError(
            "a model that serves many cannot be given to a Trainer: its superposed weights are no parameters of one"
            " model. Train the base, or one model that merge_and_unload(name) gives; to evaluate, call the model with"
            " adapter_names"
        )


@register_quantizer(BASE_ALONE)
class BaseAlone(Served):
    """Has Transformers load a store's base alone."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the configuration before the weights' files are looked for."""
        config.transformers_weights = self.quantization_config.base
        return config
