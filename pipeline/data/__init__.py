"""Tables and labels, as they stand in files.

Here: reading files as text, and each kind of label. Not here: tasks and parts, which `pipeline.load` makes of them.
"""
