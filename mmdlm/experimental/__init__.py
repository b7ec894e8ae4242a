"""Parts of the literature that no recipe here uses and no measurement here supports.

They are tested like all others, and named in YAML by their whole class paths, such as
`mmdlm.experimental.spg.Spg`. What a recipe in configs/ uses with a measured result moves to
`mmdlm.core` or `mmdlm.rl`; what nobody uses may be removed.
"""
