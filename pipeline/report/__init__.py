"""What a person is shown: tables, pictures, the page, comparisons.

Here: how results are drawn and written. Not here: where they go, see `tracking`.
"""
