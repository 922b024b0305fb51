"""Names and shapes that tensors have in files, and those that they have in a model."""
