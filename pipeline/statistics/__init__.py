"""What is worked out from predictions and labels.

Here: metrics. Not here: which of them a task has, see `pipeline.score`.
"""
