"""Where work runs: what the stages may ask of the workers that share it, and one worker alone.

Workers that are the ranks of a training are in `training/ranks.py`; nothing here knows a stage.
"""
