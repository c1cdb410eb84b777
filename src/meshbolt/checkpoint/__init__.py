"""interim"""
from meshbolt.checkpoint.policy import Checkpoint
from meshbolt.checkpoint.directory import is_checkpoint, remove_directory
try:
    from meshbolt.checkpoint.save import save_directory
    from meshbolt.checkpoint.load import load_objects, load_tensors, saved_tensors
except ImportError:
    save_directory = load_objects = load_tensors = saved_tensors = None
