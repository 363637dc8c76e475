"""The strictest settings that JAX has, for all tests: a user who sets them must not be stopped by this library.

And the code in the pages for people is run.
"""

import jax
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)

pytest_collect_file = Sybil([PythonCodeBlockParser()], patterns=["*.md"]).pytest()
