"""The command line: its arguments, what programs share (signals, exit codes, errors of one line), and what it does.

Its work on one checkpoint, on several, and on measurements made before is here too; scores are made by the stages.
"""
