"""`deepspeed.ops`: optimizers under the names of DeepSpeed's; each is torch's, or refused. Read `adam.py` first."""

from meshbolt.deepspeed.ops import adagrad, adam, lamb, lion

__all__ = ["adagrad", "adam", "lamb", "lion"]
