"""Where results are logged: the protocol, the journal that MLflow is sent from, and the mirrors W&B and TensorBoard.

Not here: what is logged, which `pipeline.validation` decides.
"""
