"""randes: many full fine-tunes of one base model, superposed into one buffer and served from inside the matmul.

sup = randes.Superposition.create(base)
sup.add("german", finetuned)
model = randes.SuperposedModel(base, sup)
model(x, adapter_names=["german", "__base__"])
"""

from randes.calibration import calibrate
from randes.compress import compress
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
from randes.factors import merge_adapter, superpose_adapters
from randes.linear import SuperposedLinear
from randes.model import SuperposedModel
from randes.plan import plan
from randes.pretrained import from_pretrained
from randes.superposition import Superposition

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
    "compress",
    "from_pretrained",
    "merge_adapter",
    "plan",
    "superpose_adapters",
]
