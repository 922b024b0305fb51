"""LitServe serves a store of models that do not generate text: classifiers, embedders, CLIP's towers. docs/litserve.md.

    randes serve STORE        # needs randes[litserve]

``tensors`` and ``rows`` know nothing of LitServe: tensors as JSON, and requests for many models answered in one batch.
``server`` is what LitServe runs.
"""
