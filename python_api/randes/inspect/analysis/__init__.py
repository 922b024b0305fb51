"""Similarity of tensors and models, and the storage of a superposition: FusionBench's analysis, for models of any size.

Models are anything that ``randes.compress`` takes. They are read a part of a tensor at a time: two parts are in memory,
or one matrix for a singular value decomposition. Similarity of weights is no measure of accuracy.
"""

from randes.inspect.analysis.likeness import Comparison, Likeness, compare_models, cosine_similarity, pairwise_cosines
from randes.inspect.analysis.retrieval import Retrieval, decorrelation, retrieval
from randes.inspect.analysis.storage import Storage, fusionbench_storage, storage
from randes.inspect.analysis.subspaces import Chunk, SubspaceSimilarity, subspace_similarity, svd_partition

__all__ = [
    "Chunk",
    "Comparison",
    "Likeness",
    "Retrieval",
    "Storage",
    "SubspaceSimilarity",
    "compare_models",
    "cosine_similarity",
    "decorrelation",
    "fusionbench_storage",
    "pairwise_cosines",
    "retrieval",
    "storage",
    "subspace_similarity",
    "svd_partition",
]
