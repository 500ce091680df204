"""Jamba and its state; imports nothing of ours. The network: model/jamba.py."""

from model.config import JambaConfig, UnsupportedWeights
from model.convert import convert_checkpoint
from model.jamba import Jamba
from model.state import HybridState, Snapshot, StateLayout
from model.weights import load_model

__all__ = [
    "HybridState",
    "Jamba",
    "JambaConfig",
    "Snapshot",
    "StateLayout",
    "UnsupportedWeights",
    "convert_checkpoint",
    "load_model",
]
