"""Models that are served: an encoder and the head of a task in a folder, and what they answer.

Here: writing and reading that folder, predictions, the script that MLflow runs. Not here: how it is sent to MLflow.
"""
