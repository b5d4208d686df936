"""Results for people: tables, figures, the HTML page, comparisons.

Here: how results are drawn and written. Not here: where they are sent, see `tracking`.
"""
