"""Checkpoints: complete folders of plain data, or nothing. Reading one executes nothing.

checkpoints/step-<N>/
    shard-00001-model-00001-of-00001.safetensors    every tensor
    state.json                                      every other value
    manifest.json                                   size and SHA-256 of the others
checkpoints/step-<N>.tmp    being written or being removed: never read
checkpoints/step-<N>.old    being replaced: put back if the new one never came

Where tensors are divided among ranks, rank R writes its parts to shard-<R+1>-..., and rank 0 what
is whole as well; a file's metadata say where its parts belong. Until rank 0 has seen it,
entry-<R>.json says that rank R is done.

The hashes find damage. Somebody who rewrites the manifest too can give a run wrong numbers, but
cannot make it execute anything, read outside the folder, or wait for a small file.
"""

from mpcli.checkpoint.layout import Checkpoint, Part, completed
from mpcli.checkpoint.reader import load, newest_valid, outline, verify
from mpcli.checkpoint.saver import Saver, check_room
from mpcli.checkpoint.writer import save

__all__ = [
    "Checkpoint",
    "Part",
    "Saver",
    "check_room",
    "completed",
    "load",
    "newest_valid",
    "outline",
    "save",
    "verify",
]
