"""A fine-tune's tensors, brought to what the base has where that changes nothing, and refused where it would."""
