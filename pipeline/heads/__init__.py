"""Heads and how they are trained.

Here: architectures, batches, the fit, optimizers, schedules. Not here: which head a task has, see `train_head`.
"""
