"""Hints for wrong calls: other libraries' names and values, translated into ours.

The names are those of torch, Keras, Optax, Paddle, MLX, timm, fairseq, apex, Liger Kernel, flash-attention,
TransformerEngine, Megatron-LM, cut-cross-entropy, Tokamax, MaxText, T5X, AXLearn, Levanter and Hugging Face's Trainer.
Nothing here is computed unless a call fails.
"""

from collections.abc import Collection

# A line for each thing, with all its names. A caller is pointed to the first one that the function takes; ours come
# first, and a line that is too long goes on in the next one with two spaces.
_SYNONYMS = """
logits local_logits input inputs inp _input x y_pred preds predictions output outputs scores lprobs log_probs logprobs
labels target targets label y y_true target_labels soft_target_labels
smoothing label_smoothing label_smooth label_smoothing_factor smoothing_factor smooth_factor smooth_eps lb_smooth
  eps epsilon alpha
prior prior_dist
axis dim class_axis class_dim axes
where mask padding_mask pad_mask loss_mask label_mask target_mask attention_mask valid valid_mask live_targets
ignore_index ignore_idx ignore_label ignore_class lb_ignore padding_idx pad_idx pad_id pad_token_id
class_weight weight ce_weight class_weights
class_mask vocab_mask logit_mask logits_mask
z_loss lse_square_scale logsumexp_weight z_loss_weight z_loss_coef z_loss_coefficient z_loss_alpha z_loss_factor
  z_loss_scale z_loss_multiplier
softcap soft_cap softcapping logit_cap logit_softcap logits_softcap logit_soft_cap logits_soft_cap final_logit_softcap
  final_logit_softcapping
denominator num_items_in_batch normalizer loss_normalizing_factor normalizing_factor avg_factor num_tokens total_tokens
implementation impl backend impl_backend
inplace_backward inplace overwrite_input
chunk_size block_size b_block_size
gradient_filter filter_eps grad_filter_eps
class_num num_classes n_classes vocab_size num_labels
axis_name group process_group dist_process_group tp_group vocab_parallel_group
"""
# The same for the operands of the linear loss.
_LAYER_SYNONYMS = """
hidden input inputs _input x e hidden_states embeddings
weight local_weight weights lin_weight linear_weight lm_head_weight kernel w c
bias lin_bias linear_bias lm_head_bias
"""
_LAYER = ("hidden", "weight", "bias")
_NOTES = {"where": " True keeps a row."}

_LINEAR_ONLY = ("hidden", "bias", "chunk_size", "recompute", "gradient_filter")
# Which of our names go to the call of a module, and which to the module.
_PER_CALL = ("where", "denominator")
_PER_MODULE = """
smoothing convention prior axis ignore_index class_weight class_mask z_loss softcap subtract_entropy bad_labels
reduction implementation inplace_backward chunk_size recompute gradient_filter
"""
_MODULE_CALLS = ("__call__", "forward")

_WITH_STATS = "The function whose name ends in _with_stats returns it for each row, as LossStats.{}."
_DTYPES = (
    "Leave it out: sums and losses are float32, or float64 for float64 logits, and gradients have the dtype of the "
    "logits."
)
_ROW_FACTORS = (
    "For factors 0 and 1 pass where. For others multiply the losses of reduction='none'. One factor per class is "
    "class_weight, and weight among torch's names."
)
_LOGITS_ONLY = "Pass logits; of probabilities pass the logarithm, since log-probabilities are logits too."
_BY_TYPE = "Pass labels: integers are class indices, floating-point labels are class probabilities."
_GROUP = (
    "Rows on several devices need no group: pass denominator=mean_denominator(labels, ...) and add up the losses. For "
    "classes on several devices there are the functions whose names begin with vocab_parallel_."
)

# What to do instead, for names that are no option here.
ADVICE = {
    "from_logits": _LOGITS_ONLY,
    "use_softmax": _LOGITS_ONLY,
    "probs": _LOGITS_ONLY,
    "logit_scale": "Multiply the logits by it; for the linear loss the hidden states and the bias.",
    "temperature": "Divide the logits by it; for the linear loss the hidden states and the bias.",
    "shift": "Shift before the call: logits[:, :-1] and labels[:, 1:].",
    "shift_labels": "Shift before the call: logits[:, :-1] and labels[:, 1:].",
    "return_z_loss": _WITH_STATS.format("z"),
    "return_lse": _WITH_STATS.format("lse"),
    "return_log_sum_exp": _WITH_STATS.format("lse"),
    "return_token_accuracy": _WITH_STATS.format("correct"),
    "return_predicted_tokens": _WITH_STATS.format("prediction"),
    "return_entropy": _WITH_STATS.format("entropy"),
    "differentiable": "Functions whose names end in _with_stats take it; the others return no statistics.",
    "axis_name": _GROUP,
    "accum_dtype": _DTYPES,
    "out_dtype": _DTYPES,
    "dtype": _DTYPES,
    "precision": _DTYPES,
    "half_to_float": _DTYPES,
    "accum_e_fp32": _DTYPES,
    "accum_c_fp32": _DTYPES,
    "inplace_backward": (
        "Leave it out: the linear loss holds no logits, and to jax.jit logits are donated, with donate_argnums."
    ),
    "reduce": "Pass reduction='mean', 'sum' or 'none'.",
    "size_average": "Pass reduction='mean' or 'sum'.",
    "reduce_loss": "Pass reduction='mean' or 'none'.",
    "sample_weight": _ROW_FACTORS,
    "weights": _ROW_FACTORS,
    "token_weights": _ROW_FACTORS,
    "label_weights": _ROW_FACTORS,
    "soft_label": _BY_TYPE,
    "soft_labels": _BY_TYPE,
    "sparse": _BY_TYPE,
    "out_features": "Leave it out: the logits, or the weight of the linear loss, have the classes.",
    "class_num": "Leave it out: the logits, or the weight of the linear loss, have the classes.",
    "axis": (
        "Leave it out: the linear loss has its classes in the weight, and torch's names come with classes in "
        "dimension 1. label_smoothed_cross_entropy takes axis."
    ),
}

# Names that belong to the other of two functions.
_NUMBERS = "add_smoothing takes nll, label_logit and mean_logit, of logits that exist."
_LAYER_OPERANDS = "linear_add_smoothing takes nll, hidden, weight and labels."
_ELSEWHERE = {
    "add_smoothing": dict.fromkeys(("hidden", "weight", "bias", "labels"), _LAYER_OPERANDS),
    "linear_add_smoothing": dict.fromkeys(
        ("label_logit", "mean_logit", "num_classes", "label_weight", "mean_weight"), _NUMBERS
    ),
}
_AXIS_NAME = (
    "Pass the name of the mesh axis that divides the classes, inside jax.shard_map. Logits that have all classes go to "
    "label_smoothed_cross_entropy."
)
# What to say about an operand that is missing.
_MISSING = {"axis_name": _AXIS_NAME, "linear_add_smoothing": _NUMBERS}

# Values of other libraries.
REDUCTIONS = {
    "batchmean": "For the sum over the number of examples pass reduction='mean' and that number as denominator.",
    "valid": "'mean' divides by the number of rows that count; for another number pass denominator.",
    "avg": "Did you mean 'mean'?",
    "average": "Did you mean 'mean'?",
    "elementwise_mean": "Did you mean 'mean'?",
    "sum_over_batch_size": "'mean' divides by the number of rows that count; for another number pass denominator.",
    "token_mean": "Did you mean 'mean'?",
    "None": "Did you mean 'none'?",
}
CONVENTIONS = {
    "uniform": ("torch", "pytorch", "keras", "timm", "optax", "paddle", "szegedy", "liger", "flash_attention"),
    "non_target": ("fairseq", "tensor2tensor", "t2t", "flax", "t5x", "megatron", "vaswani"),
    "max_sup": ("maxsup", "max_suppression"),
}
# Options with names as values, and what tells their values apart.
_CHOICES = {
    "convention": ("uniform", "non_target", "clamp", "max_sup"),
    "reduction": ("none", "sum", "mean"),
    "bad_labels": ("nan", "raise"),
    "implementation": ("fused", "chunked", "reference", "triton", "pallas"),
}


def for_keyword(name: str, accepted: Collection[str], function: str) -> str:
    """Return what to do about a keyword argument that a function does not take.

    Args:
        name: of the argument.
        accepted: the names that the function takes.
        function: its qualified name, which tells a module's own method from a function.

    Example:
        >>> for_keyword("lse_square_scale", ("logits", "labels", "z_loss"), "loss")
        "Did you mean 'z_loss'?"
        >>> for_keyword("from_logits", ("logits", "labels"), "loss")
        'Pass logits; of probabilities pass the logarithm, since log-probabilities are logits too.'
    """
    of_layer, of_loss = _synonyms(name, _LAYER_SYNONYMS), _synonyms(name, _SYNONYMS)
    candidates = of_loss
    if "hidden" in accepted:
        # There the names of the layer have one meaning: `weight` is no class weight.
        candidates = [*of_layer, *(ours for ours in of_loss if ours not in _LAYER)]
    for candidate in candidates:
        if candidate in accepted:
            return f"Did you mean {candidate!r}?{_NOTES.get(candidate, '')}"
    ours = next(iter(of_loss + of_layer), name)
    *_, method = function.rpartition(".")
    if method == "__init__" and ours in _PER_CALL:
        return f"Pass {ours} to each call of the module."
    if method in _MODULE_CALLS and ours in _PER_MODULE.split():
        return "It is an option of the module: pass it where the module is made."
    advice = _ELSEWHERE.get(function, {}).get(name) or ADVICE.get(name) or ADVICE.get(ours)
    if advice is not None:
        return advice
    of_linear = f"{ours} belongs to the linear loss, linear_label_smoothed_cross_entropy."
    return of_linear if ours in _LINEAR_ONLY else _close_match(name, accepted) or f"help({function}) lists the names."


def for_missing(name: str, function: str) -> str:
    """Return what to do about an operand that a call lacks, or nothing if its name says it all."""
    return _MISSING.get(name) or (_MISSING.get(function, "") if name == "labels" else "")


def for_type(name: str, value: object, make: str = "") -> str:
    """Return how to make the argument of that name an array, which `make`, if any, does with lists and NumPy's arrays.

    Example:
        >>> for_type("labels", [0, 1], "torch.as_tensor")
        'Pass torch.as_tensor(labels).'
    """
    if value is None:
        return f"{name} cannot be left out."
    if isinstance(value, dict) or hasattr(value, "logits"):
        return "Pass the one that it holds."
    kind = type(value)
    if make and (isinstance(value, (list, int, float)) or kind.__module__ == "numpy"):
        return f"Pass {make}({name})."
    return f"Pass its {name}." if hasattr(value, name) else "Convert it first."


def for_positional(value: object, options: Collection[str], function: str) -> str:
    """Return which option to write for a value that was passed without a name.

    Args:
        value: what was passed.
        options: the names that the function takes by keyword only.
        function: its name.

    Example:
        >>> for_positional(0.1, ("smoothing", "convention", "softcap"), "loss")
        'Options are keyword-only: write smoothing=0.1.'
        >>> for_positional("mean", ("smoothing", "convention", "reduction"), "loss")
        "Options are keyword-only: write reduction='mean'."
    """
    is_array = hasattr(value, "dtype")
    kind, _, method = function.rpartition(".")
    if is_array and function == "add_smoothing":
        return _LAYER_OPERANDS
    if is_array and method == "__init__":
        return f"Arrays go to the call of the module, as in loss = {kind}(...) and then loss(...)."
    names = [name for name in _meant_by(value) if name in options]
    if names:
        shown = "..." if is_array or not isinstance(value, (bool, int, float, str)) else repr(value)
        return "Options are keyword-only: write " + " or ".join([f"{name}={shown}" for name in names]) + "."
    return f"Write the name of the option: {', '.join(options)}." if options else "It has no options."


def _meant_by(value: object) -> tuple[str, ...]:
    """Return the options that a value may be meant for."""
    if hasattr(value, "dtype"):
        is_vector = len(getattr(value, "shape", ())) == 1
        of_floats = ("bias", "class_weight", "weight", "prior") if is_vector else ("smoothing", "denominator")
        dtype = str(value.dtype)
        return ("where", "class_mask") if "bool" in dtype else of_floats if "float" in dtype else ()
    if isinstance(value, str):
        fitting = [name for name, known in _CHOICES.items() if value in known or for_choice(name, value, known)]
        return tuple(fitting) or ("axis_name", "convention", "reduction")
    if isinstance(value, (bool, int, float)):
        return _meant_by_number(value)
    return ("convention",) if hasattr(value, "at_max") else ("stats",) if hasattr(value, "confidence") else ()


def _meant_by_number(value: float) -> tuple[str, ...]:
    if isinstance(value, bool):
        return "subtract_entropy", "differentiable", "recompute", "inplace_backward"
    if isinstance(value, float):
        return ("smoothing",) if 0 <= value <= 1 else ("softcap", "denominator")
    if value in {0, 1}:
        return "smoothing", "axis", "ignore_index"
    if -8 < value < 8:
        return "axis", "ignore_index"
    return ("ignore_index", "denominator") if value > 0 else ("ignore_index",)


def for_choice(name: str, given: object, known: Collection[str]) -> str:
    """Return what to do about an option whose value is none of its names, or nothing.

    Example:
        >>> for_choice("convention", "fairseq", ("uniform", "non_target"))
        "Did you mean 'non_target'?"
    """
    word = "None" if given is None else given if isinstance(given, str) else ""
    if name == "reduction" and word in REDUCTIONS:
        return REDUCTIONS[word]
    if name == "convention":
        for convention, libraries in CONVENTIONS.items():
            if word.lower() in libraries:
                return f"Did you mean {convention!r}?"
    return _close_match(word.lower(), known)


def _close_match(word: str, known: Collection[str]) -> str:
    """Return which known name was meant by the most alike pairs of letters, or nothing if fewer than half are alike.

    Not by `difflib`, which torch.compile cannot trace: its own error would take the place of the message.
    """
    best, most = "", 0.5
    for candidate in known:
        alike = 0
        for start in range(len(word) - 1):
            if word[start : start + 2] in candidate:
                alike += 1
        share = 2 * alike / max(1, len(word) + len(candidate) - 2)
        if share > most:
            best, most = candidate, share
    return best and f"Did you mean {best!r}?"


def _synonyms(name: str, table: str) -> list[str]:
    """Return all names of what has this name, or nothing."""
    groups = (line.split() for line in table.replace("\n  ", " ").splitlines())
    return next((group for group in groups if name in group), [])
