"""What can go wrong, by kind: catch ``RandesError`` for all of it."""


class RandesError(Exception):
    """The base of every error that randes raises for a caller's data."""


class UnknownModelError(RandesError, KeyError):
    """A model was asked for that is not there. Never answered with the base model."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError would print the message's repr


class CheckpointError(RandesError, ValueError):
    """A checkpoint does not fit: tensors missing, extra, misshapen, not finite, or not the one that was added."""


class BaseMismatchError(RandesError, ValueError):
    """The base model is not the one that the superposition was made of."""


class StoreError(RandesError, ValueError):
    """A store on disk is torn, truncated, altered, of another version, or not a store."""


class WeightReadError(RandesError, ValueError):
    """A weight that differs between models was read where no single model is meant. Never answered as the base."""


class CapacityError(RandesError, RuntimeError):
    """A model that serves others already has no room left for a change (``SuperposedModel(..., capacity=...)``)."""
