"""LitServe serves a store of models that do not generate text: classifiers, embedders, CLIP's towers. docs/litserve.md.

    randes serve STORE        # needs randes[litserve]

``tensors``, ``outputs``, ``rows`` and ``replies`` know nothing of LitServe: tensors as JSON, requests for many models
in one batch, and what is replied. ``worker`` and ``server`` are LitServe's two processes.
"""
