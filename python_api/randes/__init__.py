"""randes: many full fine-tunes of one base model, superposed into one buffer and served from inside the matmul.

sup = randes.Superposition.create(base)
sup.add("german", finetuned)
model = randes.SuperposedModel(base, sup)
model(x, adapter_names=["german", "__base__"])
"""

from randes.config import Config
from randes.errors import (
    BaseMismatchError,
    CapacityError,
    CheckpointError,
    RandesError,
    StoreError,
    UnknownModelError,
    WeightReadError,
)
from randes.inspect.choose import choose
from randes.inspect.plan import plan
from randes.serving.layers.linear import SuperposedLinear
from randes.serving.model import SuperposedModel
from randes.serving.servable import compress
from randes.superposition.basis.calibration import calibrate
from randes.superposition.lora_factors import merge_adapter, superpose_adapters
from randes.superposition.superposition import Superposition

from_pretrained = SuperposedModel.from_pretrained

__version__ = "0.1.0"

__all__ = [
    "BaseMismatchError",
    "CapacityError",
    "CheckpointError",
    "Config",
    "RandesError",
    "StoreError",
    "SuperposedLinear",
    "SuperposedModel",
    "Superposition",
    "UnknownModelError",
    "WeightReadError",
    "calibrate",
    "choose",
    "compress",
    "from_pretrained",
    "merge_adapter",
    "plan",
    "superpose_adapters",
]
