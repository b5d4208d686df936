"""Measuring a model while it trains.

Here: the Lightning callback and its companions, ranks, and what leaves a training untouched. Not here: the measurement
itself, which is `pipeline.validation`.
"""
