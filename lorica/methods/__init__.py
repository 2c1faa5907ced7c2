"""Parameter-efficient methods. One file a method; `method.py` is the contract, `attach.py` puts adapters on a model."""
