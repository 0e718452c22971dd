"""Conversations for fine-tuning: JSON lines from disk or drawn documents, and their batches.

A JSON line is `{"messages": [{"role": "user", "content": [{"type": "image", "image": "page.png"},
{"type": "text", "text": "What is the total?"}]}, {"role": "assistant", "content": "12.40"}]}`; image paths are
relative to the file. Only what the assistant says carries loss, its end token included.
"""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from training.batches import IGNORE, lesson
from training.drawing import draw, random_style

Message = dict[str, Any]


class JsonLines(Dataset):
    """Conversations of a file; pictures are opened when asked for."""

    def __init__(self, path: Path):
        self.folder = path.parent
        lines = path.read_text(encoding="utf-8").splitlines()
        self.conversations = [json.loads(line)["messages"] for line in lines if line.strip()]
        if not self.conversations:
            raise ValueError(f"{path} holds no conversation; write one JSON object with `messages` a line.")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> list[Message]:
        return [self._with_pictures(message) for message in self.conversations[index]]

    def _with_pictures(self, message: Message) -> Message:
        if isinstance(message["content"], str):
            return message
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                part = {"type": "image", "image": Image.open(self.folder / part["image"]).convert("RGB")}
            parts.append(part)
        return message | {"content": parts}


class DrawnDocuments(Dataset):
    """`size` conversations about drawn documents; number `index` is always the same."""

    def __init__(self, size: int, first_seed: int = 0, kinds: list[str] | None = None):
        self.size = size
        self.first_seed = first_seed
        self.options = {"kinds": tuple(kinds)} if kinds else {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> list[Message]:
        seed = self.first_seed + index
        conversation = lesson(seed, **self.options)
        messages: list[Message] = []
        pictures = [
            draw(page, random_style(seed + number), seed) for number, page in enumerate(conversation.documents)
        ]
        for turn in conversation.turns:
            images = [{"type": "image", "image": picture} for picture in pictures]
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            pictures = []
        return messages


class Collator:
    """Makes a batch of conversations with a processor: model inputs and `labels`.

    Args:
        processor: of the checkpoint.
        max_length: conversations of more tokens are refused, never cut.
    """

    def __init__(self, processor: Any, max_length: int):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, conversations: list[list[Message]]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            padding=True,
        )
        length = batch["input_ids"].shape[1]
        if length > self.max_length:
            raise ValueError(
                f"A conversation has {length} tokens, more than max_length={self.max_length}. Raise max_length, or "
                "lower max_num_tiles in the recipe."
            )
        said = batch.pop("assistant_masks").bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~said, IGNORE)}
