"""A checkpoint is one folder that either exists whole or does not exist.

It is written beside its place, each file hashed on its way to the disk, the manifest last, and shown by one
rename. So a kill at any moment leaves the checkpoint before untouched and at most a ``.tmp-`` folder, which
:func:`sweep` removes. Nothing here is pickled or unpickled: tensors are safetensors, everything else is JSON.

    runs/<name>/best, last                       relative links (or small text files with the same path)
    runs/<name>/checkpoints/base-….safetensors   weights that the run never changes, once, named by their SHA-256
    runs/<name>/checkpoints/step-00000100/
        model.safetensors  ema.safetensors       weights; tied ones are stored once
        trainer.safetensors  trainer.json        optimiser, schedule, position, random states; optional
        family.json  settings.json               which model this is; the settings of the run
        fitted.safetensors  fitted.json          what was learnt before the loop: codes, vocabulary, scale
        README.md                                the model card
        manifest.json                            format version, step, figures; bytes and SHA-256 of all

The folder is flat, so no name in a manifest is ever a path. On an object store the same lies below a URL; what is
another there stands in ``remote.py``.
"""

from avray.checkpoint.background import AsyncSaver
from avray.checkpoint.reading import Checkpoint
from avray.checkpoint.state import FlatState, flatten_state, unflatten_state
from avray.checkpoint.store import FOLDER, FORMAT_VERSION, checkpoints, follow, newest, point, prune, resolve, sweep
from avray.checkpoint.writing import Content, refuse_code, save

__all__ = [
    "FOLDER",
    "FORMAT_VERSION",
    "AsyncSaver",
    "Checkpoint",
    "Content",
    "FlatState",
    "checkpoints",
    "flatten_state",
    "follow",
    "newest",
    "point",
    "prune",
    "refuse_code",
    "resolve",
    "save",
    "sweep",
    "unflatten_state",
]
