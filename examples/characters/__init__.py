"""The 3755 Chinese characters of level 1 of GB 2312: `train_jax` and `train_torch` mirror each other. docs/hanzi.md."""
