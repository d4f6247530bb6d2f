"""Text: from files, tables or the hub to tokens on disk, and from there to batches."""

from __future__ import annotations

from mpcli.data.text.labelled import LabelledText
from mpcli.data.text.masking import IGNORED, Masking
from mpcli.data.text.packed import PackedText
from mpcli.data.text.tokenizer import padding
from mpcli.data.text.tokens import TextInfo, tokenised

__all__ = ["IGNORED", "LabelledText", "Masking", "PackedText", "TextInfo", "padding", "tokenised"]
