"""randes: many full fine-tunes of one base model, superposed into one buffer and served from inside the matmul.

sup = randes.compress(base, {"german": german, "legal": legal})
sup.save("store")
model = randes.load("store", Net())  # also in a new process
model(x, adapter_names=["german", "legal", "__base__"])  # one name a row
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
from randes.inspect import analysis, report
from randes.inspect.choose import choose
from randes.inspect.plan import plan
from randes.serving.layers.linear import SuperposedLinear
from randes.serving.load import load
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
    "analysis",
    "calibrate",
    "choose",
    "compress",
    "from_pretrained",
    "load",
    "merge_adapter",
    "plan",
    "report",
    "superpose_adapters",
]
