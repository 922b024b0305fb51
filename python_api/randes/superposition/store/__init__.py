"""A superposition on disk: a folder of safetensors files and one manifest that names and checks them.

    manifest.json                              format version, config, models, files, checksums of every tensor
    base-<digest>.safetensors                  the base model
    basis-<digest>.safetensors                 the shared basis of each tensor, where there is one
    group-<number>-<digest>.safetensors        integers of one group, by tensor
    unshared-<key>-<digest>.safetensors        the same of what one model shares with no other
    model-<key>-<digest>.safetensors           what one model keeps of its own
    average-<digest>.safetensors               sums behind others="average"
    config.json, tokenizer...                  what a Transformers base has beside its weights

Of each there may be several, of a chosen size (contents.py). Files are named by what they hold and never rewritten. A
save writes the new ones beside the old, renames the manifest last, and only then removes what no manifest names: a
crash at any moment leaves the old store or the new one. The bytes depend on the models and their groups alone, not on
the order in which they were added.
"""
