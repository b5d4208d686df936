"""Models that give hidden states: the protocol, Hugging Face models, live modules, a user's own classes.

Here: tokens, packing, forward passes, digests of weights and code. Not here: stored formats, see `checkpoints`.
"""
