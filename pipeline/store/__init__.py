"""The Parquet store of embeddings, and temporary folders.

Here: tables and their keys, shards, reading, writing, cleaning up after a kill. Not here: how embeddings are made.
"""
