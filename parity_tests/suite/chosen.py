"""The named cases that `make test` takes where all of them would take too long, since JAX compiles each.

The others are there in `make test-slow` or `make test-distributed`.
"""

from parity_tests.truth.cases import case_names, features, make_case

FEATURES = {name: features(make_case(name, "float32")) for name in case_names()}
# Those that use every option together.
EVERY_OPTION = ("everything", "class_mask", "bad_labels", "soft_clamp", "axis_in_the_middle")
FIRST_WITH_EACH_OPTION = {
    next(name for name in FEATURES if option in FEATURES[name]) for option in frozenset().union(*FEATURES.values())
}
# Few classes, -inf, large logits, small losses, ties, nothing to add up.
EDGES = {"classes_2", "classes_129", "minus_infinity", "minus_infinity_unsmoothed", "large_offset", "dominant"}
EDGES |= {"ties", "all_ignored", "no_rows", "class_mask_of_rows_soft"}
CHOSEN = {*EVERY_OPTION, *FIRST_WITH_EACH_OPTION, *EDGES}
