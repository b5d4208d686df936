"""What is worked out from predictions and labels: metrics, their names and directions (`metrics.py`), intervals.

Not here: predicting, which is the stage `pipeline.score`.
"""
