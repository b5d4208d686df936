"""Data as they stand in files or DataFrames: tables of text, labels of each kind, and the parts that are made of them.

Not here: reading a task's parts, which is the stage `pipeline.load`.
"""
