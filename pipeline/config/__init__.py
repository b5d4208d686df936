"""The configuration: its typed schema, and how YAML files, Hydra's and the reference's, are read into it.

Here: keys, their types, defaults and checks, spellings of the reference. Not here: what a key makes happen.
"""
