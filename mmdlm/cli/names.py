"""List the names that options take; held equal to those of the library by a test.

The library that has them imports torch, and `mmdlm --help` has to be instant.
"""

DTYPES = ("float32", "bfloat16", "float16")
FAMILY_NAMES = (
    *("llada", "mmada", "lumina", "llada_v", "lavida_llada"),
    *("dream", "lavida_dream", "dimple", "sdar", "fast_dllm"),
)
CACHES = ("prompt", "prefix", "dual", "delayed", "stable", "blocks")
ORDERS = ("confidence", "probability", "margin", "entropy", "random", "left_to_right")
SCHEDULES = ("linear", "cosine", "shifted", "ancestral")
PRESETS = ("llada", "mmada", "lumina", "dream", "dimple", "lavida", "sdar", "fast_dllm")
QUANTIZATIONS = ("4bit", "8bit", "int8", "int4", "float8")
SHELLS = ("bash", "zsh", "tcsh")
