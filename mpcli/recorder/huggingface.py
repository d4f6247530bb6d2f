"""A recorder for the Hugging Face Trainer."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from mpcli.recipe.errors import user_error
from mpcli.recorder.loop import Recorder

logger = logging.getLogger("mpcli.recorder")

_SETTINGS = (
    *("fp16", "bf16", "learning_rate", "optim", "max_grad_norm", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("torch_compile", "seed"),
)
"""Arguments of the Trainer that `foreign.json` keeps."""


class HFRecorder:
    """Records one `trainer.train()`, as `Recorder` records any loop.

    ```
    recorder = HFRecorder(trainer, out="runs/mine")
    trainer.train()
    recorder.close()
    ```
    It takes the trainer, not a callback: callbacks see neither the scaler nor the batches. Model,
    optimizer and scaler are found when the training begins, so the run directory is made then. It
    is closed when `train` ends, however that happens. Of several processes, the first one records.

    Args:
        trainer: a `transformers.Trainer`, or of a class made from it.
        out, every: as of `Recorder`.

    Raises:
        UserError: exit 2, the trainer is none. `trainer.train()` raises what `Recorder` does.
    """

    def __init__(self, trainer: Any, *, out: str | Path, every: int = 100) -> None:
        from transformers import Trainer, TrainerCallback

        if not isinstance(trainer, Trainer):
            what = f"HFRecorder takes a Hugging Face Trainer, not a {type(trainer).__name__}"
            raise user_error(what, "`Recorder(model, optimizer)` records any other loop")
        self._trainer = trainer
        self._out, self._every = out, every
        self._recorder: Recorder | None = None
        self._batches: list[Any] = []
        self._step: contextlib.AbstractContextManager[None] | None = None

        class Callback(TrainerCallback):
            """Where the Trainer's steps begin and end."""

            def on_train_begin(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    self._begin(args, state.global_step, kwargs["model"], kwargs["optimizer"])

            def on_step_begin(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self._begin_step()

            def on_step_end(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self._end_step(None)

        self._callback = Callback()
        self._is_attached = True
        trainer.add_callback(self._callback)
        self._train, self._training_step = trainer.train, trainer.training_step
        replacements = {
            "train": self._recorded_train,
            "training_step": self._recorded_training_step,
        }
        for name, method in replacements.items():
            setattr(trainer, name, method)

    def close(self, error: BaseException | None = None) -> None:
        """Write `result.json` and leave the trainer as it was; nothing happens a second time.

        Args:
            error: that ended the training.
        """
        if self._is_attached:
            self._is_attached = False
            self._trainer.remove_callback(self._callback)
            del self._trainer.train, self._trainer.training_step
        if self._recorder is not None:
            self._recorder.close(error)

    def _recorded_train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._train(*args, **kwargs)
        except BaseException as error:
            self._end_step(error)
            self.close(error)  # a data set may have raised it, between two steps
            raise
        finally:
            self._end_step(None)
            self.close()

    def _recorded_training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._batches.append(inputs)
        return self._training_step(model, inputs, *args, **kwargs)

    def _begin(self, args: Any, steps_before: int, model: Any, optimizer: Any) -> None:
        if self._recorder is not None:  # with another batch size, `auto_find_batch_size`
            logger.warning("the Trainer began again: what follows is not recorded")
            self.close()
            return
        accelerator = self._trainer.accelerator
        settings = {name: getattr(args, name, None) for name in _SETTINGS}
        self._recorder = Recorder(
            model,
            optimizer,
            accelerator.scaler,
            out=self._out,
            every=self._every,
            steps_before=steps_before,
            loop="transformers",
            settings={**settings, "mixed_precision": accelerator.mixed_precision},
        )

    def _begin_step(self) -> None:
        self._end_step(None)
        if self._recorder is not None and self._is_attached:
            self._batches = []
            self._step = self._recorder.step(self._batches)
            self._step.__enter__()

    def _end_step(self, error: BaseException | None) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(type(error) if error else None, error, None)
        self._batches = []
