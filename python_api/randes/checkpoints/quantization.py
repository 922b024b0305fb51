"""What Transformers holds of a model over a store: that it is no plain one, and that its weights are not to be saved.

Transformers is imported here; only its own models need it.
"""

from typing import Any

from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from randes.checkpoints.huggingface import METHOD


class RandesConfig(QuantizationConfigMixin):
    """What a store's config.json says of its weights. base: the file of the base's, beside it."""

    def __init__(self, base: str, **_: Any) -> None:
        self.quant_method, self.base = METHOD, base


class Served(HfQuantizer):
    """Held by a model that serves many, so that Transformers' ``save_pretrained`` refuses to write the base as it."""

    def is_serializable(self) -> bool:
        """Not by Transformers: ``Superposition.save`` and ``SuperposedModel.save_pretrained`` write stores."""
        return False

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
