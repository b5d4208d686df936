"""Stored checkpoints, to encoders.

Here: what each format holds, and how it is read without running its code. Not here: how a model runs, see `encoders`.
"""
