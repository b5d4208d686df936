"""The Parquet store of embeddings, and temporary folders.

Here: what is kept under which key, shards, reading, what a kill leaves. Not here: what embeddings are made of.
"""
