"""What a superposition holds, and how near what comes back of it is to what went in."""

from randes.superposition.summary.describe import described, ranks, summary
from randes.superposition.summary.verify import Verification, energy, predicted, sharing_of, verify

__all__ = ["Verification", "described", "energy", "predicted", "ranks", "sharing_of", "summary", "verify"]
