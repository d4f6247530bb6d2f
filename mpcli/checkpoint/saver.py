"""The checkpoints of one run: room for them, and saving while the training waits or goes on."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpcli.checkpoint.layout import Checkpoint, Part, completed, parts_of
from mpcli.checkpoint.writer import begin, make_folder, save, save_share
from mpcli.ranks import ALONE, Ranks, lost_peer
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.rundir import storage_errors

logger = logging.getLogger(__name__)

_TENSOR_BYTES = 512  # at most, of a header, for a tensor's name, shape and place
_OTHER_BYTES = 2**15  # state, manifest, and what a file system needs for three files


def check_room(
    folder: Path,
    tensors: Mapping[str, Tensor | Part],
    ranks: Ranks = ALONE,
    *,
    saves: int,
    keep: int,
    final_bytes: int,
) -> None:
    """Check that the checkpoints to come, and the trained model, have room on the disk.

    Args:
        folder: `checkpoints` of a run; made if its parent exists.
        tensors: of one checkpoint; parts count as what they are parts of.
        ranks: that write it.
        saves: still to come.
        keep: checkpoints that stay beside the one that is being written.
        final_bytes: of the trained model.

    Raises:
        UserError: exit 7, the folder cannot be written or has not the room.
    """
    with storage_errors(folder, f"`{folder.name}`"):
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
        present = len(completed(folder))
    wholes = [v if isinstance(v, Part) else Part.whole(v) for v in tensors.values()]
    each = sum(whole.whole_bytes for whole in wholes)
    each += _writers(tensors, ranks) * (_OTHER_BYTES + _TENSOR_BYTES * len(wholes))
    new = max(0, min(present + saves, keep + 1) - present)
    needed = new * each + final_bytes
    if needed > free:
        raise user_error(
            f"not enough room: {new} checkpoints of {each:,} bytes and the trained model need "
            f"{needed:,} bytes, and {free:,} are free",
            "free some space; a new run may go elsewhere with `--output DIR`, or keep fewer "
            "checkpoints with `output.keep_last`",
            path="output.keep_last",
            exit_code=Exit.STORAGE,
        )


class Saver:
    """Saves one checkpoint at a time, in a thread of its own with `background`.

    In the background, a save holds the training up for a copy of the tensors in host memory, and
    for the end of the save before it. The memory of the copy is kept for the next one. As a
    context, it waits at the end for a save that is going on.

    With several ranks each has one, made and called at the same points. Where tensors are divided
    among them, each rank writes its parts, and rank 0 the rest; otherwise rank 0 alone writes.

    Args:
        folder: `checkpoints` of a run.
        keep_last: see `save`.
        tensors: those that will be saved; only their shapes and types count.
        ranks: that save together.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        tensors: Mapping[str, Tensor | Part],
        ranks: Ranks = ALONE,
        *,
        background: bool,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.ranks = ranks
        self._writers = _writers(tensors, ranks)
        self._writes = ranks.rank < self._writers
        self._copies: dict[str, Tensor] | None = None
        if background and self._writes:
            # Zeros: memory that was never written to would have to be found during the first save.
            parts = parts_of(tensors, ranks.rank)
            self._copies = {name: _host_zeros(part.tensor) for name, part in parts.items()}
        self._thread: threading.Thread | None = None
        self._lost = threading.Event()  # the other ranks
        self._saved: Checkpoint | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor | Part],
        state: Mapping[str, Any],
        keep: Collection[int] = (),
    ) -> None:
        """Begin to save; `finished` tells when it is done. State and `keep` are rank 0's.

        Raises:
            UserError: exit 7, this save or the one before it failed.
        """
        self.finished(wait=True)
        if not self._writes:
            return
        if self._writers > 1:
            if self.ranks.is_main:
                begin(self.folder, step)
            self.ranks.barrier()
        parts = parts_of(tensors, self.ranks.rank)
        if self._copies is None:
            self._saved = self._write(step, parts, state, keep)
            return
        copied = self._copy(self._copies, {name: part.tensor for name, part in parts.items()})
        parts = {
            name: dataclasses.replace(part, tensor=self._copies[name])
            for name, part in parts.items()
        }
        self._thread = threading.Thread(
            target=self._write_copies, args=(step, parts, state, keep, copied), daemon=True
        )
        self._thread.start()

    def finished(self, *, wait: bool = False) -> Checkpoint | None:
        """The newest checkpoint that is on the disk since this saver was made, if any.

        In a rank other than 0 that is known of its own file only.

        Args:
            wait: for the end of a save that is going on.

        Raises:
            UserError: exit 7, a save failed; the checkpoints before it are there.
        """
        if self._thread and (wait or not self._thread.is_alive()):
            self._thread.join()
            self._thread = None
            error, self._error = self._error, None
            if error:
                raise error
        return self._saved

    def __enter__(self) -> None:
        """Nothing is going on yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is KeyboardInterrupt:  # a second Ctrl-C waits for nothing
            return
        if error and lost_peer(error):  # which wrote its part before it went, or never will
            self._lost.set()
        try:
            self.finished(wait=True)
        except UserError as error:  # what ends the block is worse, and told
            logger.warning("%s", error)

    @staticmethod
    def _copy(copies: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        """Copy without waiting for a GPU; the event tells when its copies are there."""
        for name, tensor in tensors.items():
            copy = copies[name]
            if tensor.is_cpu and tensor.stride() == copy.stride():
                # torch would divide it among threads and wait for all of them: on a busy
                # machine that takes longer than copying.
                np.copyto(_bytes(copy), _bytes(tensor))
            else:
                copy.copy_(tensor, non_blocking=True)
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied

    def _write(
        self,
        step: int,
        parts: Mapping[str, Part],
        state: Mapping[str, Any],
        keep: Collection[int],
    ) -> Checkpoint:
        if not self.ranks.is_main:
            return save_share(self.folder, step, parts, self.ranks.rank)
        return save(
            self.folder,
            step,
            parts,
            state,
            keep_last=self.keep_last,
            keep=keep,
            writers=self._writers,
            patience=self.ranks.timeout,
            lost=self._lost,
        )

    def _write_copies(
        self,
        step: int,
        parts: Mapping[str, Part],
        state: Mapping[str, Any],
        keep: Collection[int],
        copied: torch.cuda.Event | None,
    ) -> None:
        """What the thread does."""
        try:
            if copied:
                copied.synchronize()
            self._saved = self._write(step, parts, state, keep)
        except BaseException as error:
            self._error = error


def _writers(tensors: Mapping[str, Tensor | Part], ranks: Ranks) -> int:
    """How many ranks write: rank 0 alone, where nothing is divided."""
    divided = any(isinstance(value, Part) for value in tensors.values())
    return ranks.world_size if divided else 1


def _host_zeros(tensor: Tensor) -> Tensor:
    """In the tensor's own memory format if it is dense, or contiguous."""
    zeros = torch.zeros_like(tensor, device="cpu")
    return zeros.pin_memory() if tensor.is_cuda else zeros


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The memory of a dense tensor on the CPU."""
    elements = tensor.detach().as_strided((tensor.numel(),), (1,))
    array: NDArray[np.uint8] = elements.view(torch.uint8).numpy()
    return array
