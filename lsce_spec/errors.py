"""The messages that both frameworks share, in one table. Each package has a table of its own for the others.

A message says what was expected, what was given, and what to do about it.
"""

import re
from collections.abc import Mapping, Sequence

# The exception and the text of each message, by key. The names in braces are filled in by `error`.
MESSAGES: dict[str, tuple[type[Exception], str]] = {
    "array_type": (
        TypeError,
        "{name} must be {expected}, got {given}. {hint}",
    ),
    "not_installed": (
        ModuleNotFoundError,
        "{user} needs {name}, which is not installed. Run: {install}.",
    ),
    "logits_dtype": (
        TypeError,
        "logits must be floating point (float64, float32, bfloat16 or float16), got {given}. "
        "Convert to a floating-point dtype first; the order of the arguments is logits, labels.",
    ),
    "logits_scalar": (
        ValueError,
        "logits must have a class dimension, got a scalar (shape []). Pass an array of shape [..., K] with K classes.",
    ),
    "no_classes": (
        ValueError,
        "logits must have at least one class, got shape {shape} with 0 classes at axis {axis}. "
        "Check which dimension holds the classes.",
    ),
    "axis": (
        ValueError,
        "axis must be an integer in [{low}, {high}] for logits of shape {shape}, got {given}. "
        "It names the dimension of the logits that holds the classes.",
    ),
    "labels_dtype": (
        TypeError,
        "labels must be class indices (an integer dtype) or class probabilities "
        "(a floating-point dtype), got {given}. Convert to one of these.",
    ),
    "labels_shape": (
        ValueError,
        "integer labels must have the shape of the logits without the class dimension: "
        "expected {expected} for logits of shape {logits} with classes at axis {axis}, got {given}. "
        "{hint}",
    ),
    "soft_labels_shape": (
        ValueError,
        "floating-point labels must have the shape of the logits, one probability for each class: "
        "expected {expected}, got {given}. {hint}",
    ),
    "smoothing_type": (
        TypeError,
        "smoothing must be a number or an array of the framework in use, got {given}. "
        "Pass a number in [0, 1], such as 0.1.",
    ),
    "smoothing_range": (
        ValueError,
        "smoothing must be in [0, 1], got {given}. 0 turns it off; 0.1 is usual.",
    ),
    "label_smooth": (
        ValueError,
        "label_smooth must be None or a number in [0, 1], got {given}. None means plain cross-entropy; 0.1 is usual.",
    ),
    "convention_functions": (
        TypeError,
        "the {name} of a Convention must be a function of {arguments}, got {given}. For a constant pass a lambda.",
    ),
    "convention_type": (
        TypeError,
        "convention must be a name or a Convention object, got {given}. Known names: {known}.",
    ),
    "convention_name": (
        ValueError,
        "unknown convention {given}. Known names: {known}; for any other pass Convention(name, on, off). {hint}",
    ),
    "reduction": (
        ValueError,
        "unknown reduction {given}. Choose one of: {known}. {hint}",
    ),
    "array_option": (
        TypeError,
        "{name} must be a plain Python value, which no array or tensor is, got {given}. Of a tensor pass .item(), "
        "outside of torch.compile; under jax.jit name the argument in static_argnames, or close over the value.",
    ),
    "unexpected_keyword": (
        TypeError,
        "{function}() got an unexpected keyword argument {name}. {hint}",
    ),
    "positional": (
        TypeError,
        "{function}() takes {names} by position. {hint}",
    ),
    "missing": (
        TypeError,
        "{function}() is missing {name}. {hint}",
    ),
    "implementation": (
        ValueError,
        "unknown implementation {given}. Choose None (the best one available) or one of: {known}. {hint}",
    ),
    "kernel": (
        ValueError,
        "implementation={name} cannot compute this call: {reason}. Leave out the implementation, or choose {instead}.",
    ),
    "bad_labels": (
        ValueError,
        "unknown bad_labels {given}. Choose one of: {known}. {hint}",
    ),
    "flag": (
        TypeError,
        "{name} must be True or False, got {given}.",
    ),
    "entropy_at_max": (
        ValueError,
        "subtract_entropy needs a target that is a distribution, but that of convention={given} is negative at the "
        "largest logit. Drop one of the two.",
    ),
    "non_negative_number": (
        ValueError,
        "{name} must be a finite Python number >= 0, got {given}. 0 turns it off.",
    ),
    "softcap": (
        ValueError,
        "softcap must be None or a finite Python number > 0, got {given}. None turns it off.",
    ),
    "ignore_index": (
        ValueError,
        "ignore_index must be None or an integer of 32 bits, got {given}. To leave out rows by position use where.",
    ),
    "ignore_index_soft": (
        ValueError,
        "ignore_index={given} needs class indices as labels, got class probabilities. Leave out rows with where.",
    ),
    "denominator": (
        ValueError,
        "denominator is used by reduction='mean' only, got it with reduction={reduction}. "
        "Drop it, or use reduction='mean'.",
    ),
    "batch_operand_shape": (
        ValueError,
        "{name} must broadcast to the shape of the losses, {expected}, got {given}. "
        "The shape of the losses is that of the logits without the class dimension.",
    ),
    "denominator_value": (
        ValueError,
        "denominator must be a finite number >= 0 or a scalar array of one, got {given}. "
        "It is what the sum of the losses is divided by.",
    ),
    "denominator_labels": (
        TypeError,
        "labels must be class indices, got {given}. Each row of class probabilities counts as one: "
        "pass labels.argmax over the classes.",
    ),
    "denominator_shape": (
        ValueError,
        "denominator must be a single number, got shape {given}. Sum it over the batch first.",
    ),
    "boolean": (
        TypeError,
        "{name} must be boolean, got {given}. Compare first, as in {name} = {name} != 0.",
    ),
    "class_vector_shape": (
        ValueError,
        "{name} must hold one value per class: expected shape {expected}, got {given}. {hint}",
    ),
    "class_mask_shape": (
        ValueError,
        "class_mask must have shape [{classes}], one mask for all rows, or the dimensions of the logits, with 1 where "
        "rows share a mask: logits {logits} have their classes at axis {axis}, got {given}. {hint}",
    ),
    "prior_row_mask": (
        ValueError,
        "prior needs one class_mask for all rows, since it must be 0 outside the mask, got a class_mask of shape "
        "{given}. Pass the smoothed targets of the rows as labels, with smoothing=0.",
    ),
    "class_vector_dtype": (
        TypeError,
        "{name} must be floating point, got {given}. Convert it first.",
    ),
    "prior_convention": (
        ValueError,
        "prior replaces the uniform distribution of convention='uniform', got convention={given}. Drop one of the two.",
    ),
    "prior_negative": (
        ValueError,
        "prior must hold probabilities >= 0, got {given} at class {index}. "
        "Divide non-negative class counts by their sum.",
    ),
    "prior_sum": (
        ValueError,
        "prior must sum to 1, got a sum of {given}. Divide it by its sum.",
    ),
    "prior_outside_mask": (
        ValueError,
        "prior must be 0 for classes outside class_mask, got {given} at class {index}. "
        "Set it to 0 there and divide by the sum.",
    ),
    "count": (
        ValueError,
        "{name} must be an integer >= 1, got {given}.",
    ),
    "class_num_shape": (
        ValueError,
        "logits must have the classes at axis 1, as in [N, class_num], got shape {shape}. Add a batch dimension.",
    ),
    "class_num": (
        ValueError,
        "class_num is {expected}, but the logits of shape {shape} have {given} classes at axis 1. {hint}",
    ),
    "convert_smoothing": (
        ValueError,
        "no smoothing of convention {target} gives the target of {source} with smoothing={smoothing} and {num_classes} "
        "classes: {values}. Pass convention={source} instead.",
    ),
    "convert_number": (
        TypeError,
        "smoothing must be a Python number in [0, 1], such as 0.1, got {given}. "
        "Convert the values of a schedule one by one.",
    ),
    "identify_label": (
        ValueError,
        "labels must be class indices from 0 to {last}, got {value} at index {index}. Leave out the rows that the loss "
        "ignores.",
    ),
    "identify_dtype": (
        TypeError,
        "{name} must be float32 or float64, got {given}, which is too coarse to tell conventions apart. "
        "Compute in float32, as with logits.float() in torch.",
    ),
    "identify_shape": (
        ValueError,
        "{name} must be numbers of shape {expected}, one row per example and none of it empty. "
        "Flatten the batch dimensions first.",
    ),
    "identify_finite": (
        ValueError,
        "{name} must be finite numbers. Leave out the rows that are not.",
    ),
    "identify_rows": (
        ValueError,
        "{rows} rows like these do not tell conventions apart. Pass some ten rows of random normal logits, and two "
        "classes or more.",
    ),
    "stats_type": (
        TypeError,
        "stats must be the LossStats that label_smoothed_cross_entropy_with_stats returns second, got {given}.",
    ),
    "stats_shape": (
        ValueError,
        "logits and stats must be of the same batch: expected {expected} rows as in stats, got {given}. "
        "Pass the logits and labels that the loss was given.",
    ),
    "top_k": (
        ValueError,
        "k={k} needs logits of at least {k} classes, got {given}. Choose a smaller k, or check axis.",
    ),
    "chunk_size": (
        ValueError,
        "chunk_size must be a positive integer, the number of rows whose logits are in memory at a time, or None, "
        "got {given}. Leave it out to let it be chosen.",
    ),
    "recompute_none": (
        ValueError,
        "recompute=False needs reduction='sum' or 'mean': a gradient that is computed with the loss cannot know what "
        "each row's will be multiplied with. Leave recompute out, or reduce.",
    ),
    "differentiable_recompute": (
        ValueError,
        "differentiable=True needs the gradient to be computed after the loss: a gradient that is computed with it "
        "cannot know what the statistics will be multiplied with. Leave recompute out, or pass recompute=True.",
    ),
    "gradient_filter": (
        ValueError,
        "gradient_filter must be a number in [0, 1), got {given}. 0 leaves nothing out.",
    ),
    "filter_recompute": (
        ValueError,
        "gradient_filter needs the gradient to be computed with the loss: reduction='sum' or 'mean', and neither "
        "recompute=True nor differentiable=True. Change these, or leave gradient_filter out.",
    ),
    "filter_row_mask": (
        ValueError,
        "gradient_filter needs one class_mask for all rows, since it leaves classes out for all of them. Pass a "
        "class_mask with one value for each class, or leave gradient_filter out.",
    ),
    "chunked_only": (
        ValueError,
        "{name} is an option of implementation='chunked'; 'reference' computes all logits at once. "
        "Leave out {name}={given} or the implementation.",
    ),
    "hidden_dtype": (
        TypeError,
        "{name} must be floating point (float64, float32, bfloat16 or float16), got {given}. Convert it first; "
        "the order of the arguments is hidden, weight, labels.",
    ),
    "hidden_scalar": (
        ValueError,
        "hidden must have a feature dimension, got a scalar (shape []). Pass an array of shape [..., D].",
    ),
    "weight_shape": (
        ValueError,
        "weight must have shape {layout} with D = {features} features, the size of the last dimension of hidden "
        "{hidden}, got {given}. {hint}",
    ),
    "bias_shape": (
        ValueError,
        "bias must have one number for each of the {classes} classes: expected {expected}, got {given}. {hint}",
    ),
    "linear_soft_labels": (
        TypeError,
        "labels of the linear loss must be class indices (an integer dtype), got {given}: class probabilities are as "
        "large as the logits that it avoids. Use label_smoothed_cross_entropy on the logits.",
    ),
    "labels_no_class": (
        UserWarning,
        "{number} of {total} labels are no class, and make the loss NaN: {found}, expected {expected}. {cure} "
        "bad_labels='raise' names the first bad label. This is said once for each line that calls a loss.",
    ),
    "smoothing_refused": (
        TypeError,
        "{function} does not take {name}: {reason}.",
    ),
    "smoothing_at_max": (
        ValueError,
        "convention={given} takes its smoothing from the largest logit, which the unsmoothed loss does not tell. "
        "Use label_smoothed_cross_entropy or linear_label_smoothed_cross_entropy.",
    ),
    "smoothing_row_mask": (
        ValueError,
        "class_mask must be one mask for all rows: with one for each row, each needs every logit for its mean. "
        "Use linear_label_smoothed_cross_entropy.",
    ),
    "smoothing_operands": (
        ValueError,
        "hidden must be [..., D] and weight a matrix, got both with the shape of nll, {given}. "
        "If they are the label_logit and mean_logit of each row, call add_smoothing.",
    ),
    "smoothing_num_classes": (
        ValueError,
        "convention={given} depends on the number of classes: pass num_classes. Only 'uniform' does not.",
    ),
    "smoothing_weights": (
        ValueError,
        "class weights need both label_weight (w_y of each row) and mean_weight (the mean of the weights), but "
        "{missing} is missing. Pass both.",
    ),
    "smoothing_soft_labels": (
        TypeError,
        "labels must be class indices (an integer dtype), got {given}: smoothing is added at one class. "
        "For class probabilities use label_smoothed_cross_entropy on the logits.",
    ),
    "row_numbers_dtype": (
        TypeError,
        "{name} must be floating point (float64, float32, bfloat16 or float16), got {given}. Convert it first.",
    ),
    "row_numbers_shape": (
        ValueError,
        "{name} must have one number for each row: expected shape {expected}, got {given}. {hint}",
    ),
    "bad_label": (
        IndexError,
        "label {value} at index {index} is not one of the classes: expected {expected}. "
        "To leave such rows out pass {ignore_index} or where.",
    ),
}


def error(key: str, *, wrong_type: bool = False, **given: object) -> Exception:
    """Return the exception for `key` of `MESSAGES`, filled in with `given`.

    `wrong_type` makes it a TypeError: the value is not merely out of range.

    Example:
        >>> print(error("count", name="class_num", given=0))
        class_num must be an integer >= 1, got 0.
    """
    kind, text = MESSAGES[key]
    return (TypeError if wrong_type else kind)(text.format(**given).rstrip())


def names_for(names: Mapping[str, str]) -> Sequence[tuple[re.Pattern[str], str]]:
    """Return names in the form that `renamed` takes: for each pattern, which matches whole words, the caller's name."""
    # What is quoted is a value. Compiled here, as torch.compile cannot do it.
    return [(re.compile(rf"(?<![\w'.]){pattern}(?![\w'])"), name) for pattern, name in names.items()]


def renamed(problem: Exception, names: Sequence[tuple[re.Pattern[str], str]]) -> Exception:
    """Return an exception of ours in the names of the function that was called, and any other as it is.

    Example:
        >>> problem = error("smoothing_range", given=1.5)
        >>> print(renamed(problem, names_for({"smoothing": "label_smoothing"})))
        label_smoothing must be in [0, 1], got 1.5. 0 turns it off; 0.1 is usual.
    """
    if type(problem) not in {TypeError, ValueError, IndexError, RuntimeError}:
        return problem
    text = str(problem)
    for pattern, name in names:
        text = pattern.sub(name, text)
    return type(problem)(text)


def refused(key: str, name: str, value: object, *, wrong_type: bool, **given: object) -> Exception:
    """Return the exception for an option whose value is refused: that for `key`, or for an array in its place.

    The text of an array is left out, since traced tensors have none.
    """
    if hasattr(value, "dtype"):
        return error("array_option", name=name, given=type(value).__name__)
    return error(key, wrong_type=wrong_type, name=name, given=repr(value), **given)
