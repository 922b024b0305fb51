"""Whether a fine-tune means the base's configuration: every model of a superposition runs under that one.

What a key does is its architecture's own affair. So all that differs is refused, but for keys that are known to change
no answer. Transformers' configuration classes say what a key is where a file leaves it out, and read the names that
older versions gave it.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Set
from importlib.util import find_spec
from typing import Any

from randes.checkpoints.huggingface import CONFIG, METHOD, config_of, configuration, library
from randes.errors import CheckpointError

WEIGHTS = {"dtype", "torch_dtype", "vocab_size", "transformers_weights"}
"""What the tensors say, which are checked by themselves."""
LABELS = {
    "id2label", "label2id", "num_labels", "_num_labels", "num_classes", "label_names", "problem_type",
    "finetuning_task",
}  # fmt: skip
NAMES = {
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "tokenizer_class", "unsloth_version",
    "unsloth_fixed", "task_specific_params", "_diffusers_version",
}  # fmt: skip
TRAINING = {
    "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob", "hidden_dropout_rate",
    "activation_dropout", "classifier_dropout", "classifier_dropout_prob", "classif_dropout", "seq_classif_dropout",
    "qa_dropout", "dropout", "dropout_rate", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout",
    "resid_dropout", "embed_dropout", "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "drop_path_rate",
    "gradient_checkpointing", "initializer_range", "initializer_factor", "router_aux_loss_coef",
}  # fmt: skip
GENERATION = {
    "use_cache", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "num_return_sequences", "min_length", "exponential_decay_length_penalty", "remove_invalid_values",
    "return_dict_in_generate", "output_scores",
}  # fmt: skip
OUTPUTS = {"output_attentions", "output_hidden_states", "return_dict", "torchscript"}
HARMLESS = WEIGHTS | LABELS | NAMES | TRAINING | GENERATION | OUTPUTS | {"attn_implementation", "_attn_implementation"}
"""Exact names: NLLB-MoE's ``moe_token_dropout`` scales what it answers, AST's ``max_length`` is of its input."""
TIED = {"tie_word_embeddings"}
"""Harmless for causal models, whose tensors say it; T5 and its kin scale what a tied head gets."""
STEERING = {"bos_token_id", "eos_token_id", "decoder_start_token_id"}
"""Harmless where a model is of a class that generates. A classifier finds the place that it reads by such a token, CLIP
the text's end, and BART begins with one whatever it answers."""
CAUSAL = ("ForCausalLM", "LMHeadModel")
POSITIONED = ("bert", "data2vec", "xmod", "trocr")
"""In the names of causal models whose positions count from the padding; others read no id of it."""
FEW = 5


def check_configuration(base: Mapping[str, bytes], finetuned: object) -> None:
    """Raise ``CheckpointError`` where a fine-tune's configuration says that it answers otherwise than the base's.

    base: the files that go with it, by name. finetuned: a model, or the path of a folder or of a file beside a
    ``config.json``; what has no configuration is not compared, nor is anything with a base that has none.
    Warns of what is in one of them alone, where Transformers does not say what it is in the other.
    """
    if CONFIG not in base or (text := config_of(finetuned)) is None:
        return
    where = str(finetuned) if isinstance(finetuned, str | os.PathLike) else f"the {type(finetuned).__name__}"
    ours, theirs = _read(base[CONFIG], "the base"), _read(text, where)
    found, known = [*_differences(ours, theirs)], False
    if found and ours.get("model_type") == theirs.get("model_type"):
        completed = _completed(ours), _completed(theirs)
        if known := None not in completed:
            found = [*_differences(*completed)]  # type: ignore[arg-type]
    refused = found if known else [one for one in found if ABSENT not in one]
    if refused:
        named = "; ".join(f"{key} must be {own!r}, got {other!r}" for key, own, other in refused[:FEW])
        more = f"; and {len(refused) - FEW} more" if len(refused) > FEW else ""
        raise CheckpointError(f"{where} must have the base's configuration, which all models run under: {named}{more}")
    if found:
        alone = ", ".join(key for key, *_ in found)
        warnings.warn(
            f"of {where} and the base one alone has {alone} in its {CONFIG}; what the other means by leaving it out is"
            " known where Transformers is installed and knows the model",
            stacklevel=3,
        )


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key, the base's value and the other's, of all that may change an answer."""
    yield from _unequal(ours, theirs, HARMLESS | (_steering(ours) & _steering(theirs)))


def _unequal(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], harmless: Set[str], within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted((ours.keys() | theirs.keys()) - harmless):
        own, other = ours.get(key, ABSENT), theirs.get(key, ABSENT)
        if own == other or {type(own), type(other)} == {type(None), _Absent}:
            continue
        if key == "architectures" and not (own and other):
            continue  # of a configuration that no model was saved with
        if isinstance(own, dict) and isinstance(other, dict):
            yield from _unequal(own, other, harmless, f"{within}{key}.")
        else:
            yield f"{within}{key}", own, other


def _steering(values: Mapping[str, Any]) -> set[str]:
    """The tokens' ids that a model of this configuration only generates with, and what its tensors say."""
    names = [str(name) for name in values.get("architectures") or ["unknown"]]
    tied = TIED if all(name.endswith(CAUSAL) for name in names) else set()
    if all(name.endswith(CAUSAL) and not any(kind in name.lower() for kind in POSITIONED) for name in names):
        return {*STEERING, *tied, "pad_token_id"}
    return STEERING | tied if all(name.endswith((*CAUSAL, "ForConditionalGeneration")) for name in names) else set()


def _read(text: bytes, where: str) -> dict[str, Any]:
    """A configuration as it was written, without what a store says of itself in it."""
    values = configuration(text, where)
    if (values.get("quantization_config") or {}).get("quant_method") == METHOD:
        del values["quantization_config"]
    return values


def _completed(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same with all that a file leaves out, also of the configurations in it; None where nobody knows that."""
    if find_spec("transformers") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = library().CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
            whole: dict[str, Any] = json.loads(json.dumps(made.to_dict(), default=str))
    except Exception:  # whatever a class has against a file: it is compared as it was written
        return None
    return whole
