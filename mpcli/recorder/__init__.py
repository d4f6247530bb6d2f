"""Records of somebody else's training loop: any PyTorch loop, or a Hugging Face Trainer."""

from mpcli.recorder.huggingface import HFRecorder
from mpcli.recorder.loop import Recorder

__all__ = ["HFRecorder", "Recorder"]
