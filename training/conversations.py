"""Conversations for fine-tuning: JSON lines from disk or drawn documents, and their batches.

A JSON line is `{"messages": [{"role": "user", "content": [{"type": "image", "image": "page.png"},
{"type": "text", "text": "What is the total?"}]}, {"role": "assistant", "content": "12.40"}]}`; image paths are
relative to the file. They may also stand in a list `images` beside `messages`, in the order of the image parts. Only
what the assistant says carries loss, its end token included.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nemotron_vl.prompts import flatten_content
from PIL import Image
from torch.utils.data import Dataset

from training.batches import IGNORE
from training.documents import COLUMNS
from training.drawing import draw, random_style
from training.lessons import lesson
from training.questions import Conversation

Message = dict[str, Any]
FRAME = "<|start_header_id|><|end_header_id|>\n\n<|eot_id|>"  # of a message
PICTURE_KEYS = ("image", "path", "url")


class Outline(NamedTuple):
    """What tells the length of a conversation.

    Args:
        text: everything that is said, and the role that says it.
        picture_sizes: (height, width) of each picture in pixels.
        num_messages: how many messages there are.
    """

    text: str
    picture_sizes: list[tuple[int, int]]
    num_messages: int


class JsonLines(Dataset):
    """Conversations of a file; pictures stay paths until the processor opens them.

    Raises:
        ValueError: for a line that cannot be trained on; the message says which line and why.
    """

    def __init__(self, path: Path):
        self.conversations: list[list[Message]] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    self.conversations.append(read_conversation(json.loads(line), path.parent))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
        if not self.conversations:
            raise ValueError(f"{path} holds no conversation; write one JSON object with `messages` a line.")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> list[Message]:
        return self.conversations[index]

    def outline(self, index: int) -> Outline:
        texts, sizes = [], []
        for message in self.conversations[index]:
            text, pictures = flatten_content(message["content"])
            texts.append(message["role"] + text)
            for picture in pictures:
                with Image.open(picture) as opened:
                    sizes.append(opened.size[::-1])
        return Outline("".join(texts), sizes, len(texts))


def read_conversation(entry: Any, folder: Path) -> list[Message]:
    """Return the messages of a JSON line with the paths of their pictures made absolute.

    Raises:
        ValueError: if it holds no messages, no answer, or pictures that are not there.
        TypeError: for content of another form than the chat template takes.
    """
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    ):
        raise ValueError("needs an object with `messages`, a list of objects with `role` and `content`.")
    listed = list(entry.get("images") or [])
    found = [message | {"content": _with_paths(message["content"], listed, folder)} for message in messages]
    if listed:
        raise ValueError(f"`images` names {len(listed)} more pictures than the messages have image parts.")
    if not any(message["role"] == "assistant" and message["content"] for message in found):
        raise ValueError("no message of the assistant, so there is nothing to learn from.")
    return found


def _with_paths(content: Any, listed: list[str], folder: Path) -> Any:
    """Give the image parts of a message absolute paths; parts without one take the next of `listed`."""
    flatten_content(content)  # judges its form
    if content is None or isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, dict) and part["type"] != "text":
            name = next((part[key] for key in PICTURE_KEYS if part.get(key)), None)
            name = listed.pop(0) if name is None and listed else name
            if not isinstance(name, str) or not (folder / name).is_file():
                raise ValueError(f"the picture {name!r:.80} is no file in {folder}; give its path relative to that.")
            part = {"type": "image", "image": str(folder / name)}
        parts.append(part)
    return parts


class DrawnDocuments(Dataset):
    """`size` conversations about drawn documents; number `index` is always the same."""

    def __init__(self, size: int, first_seed: int = 0, kinds: list[str] | None = None):
        self.size = size
        self.first_seed = first_seed
        self.options = {"kinds": tuple(kinds)} if kinds else {}

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> Conversation:
        return lesson(self.first_seed + index, **self.options)

    def __getitem__(self, index: int) -> list[Message]:
        seed = self.first_seed + index
        conversation = self.conversation(index)
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

    def outline(self, index: int) -> Outline:
        conversation = self.conversation(index)
        styles = [random_style(self.first_seed + index + number) for number in range(len(conversation.documents))]
        sizes = [
            (style.cell_height * len(page.lines), style.cell_width * COLUMNS)
            for page, style in zip(conversation.documents, styles, strict=True)
        ]
        text = "".join(f"user{turn.question}assistant{turn.answer}" for turn in conversation.turns)
        return Outline(text, sizes, 2 * len(conversation.turns))


def lengths_of(dataset: JsonLines | DrawnDocuments, processor: Any, max_length: int) -> list[int]:
    """Tokens of each conversation, without opening its pictures; exact up to a few tokens a message.

    Raises:
        ValueError: if one is longer than `max_length`.
    """
    frame = len(processor.tokenizer(FRAME, add_special_tokens=False).input_ids)
    lengths = []
    for index in range(len(dataset)):
        outline = dataset.outline(index)
        words = len(processor.tokenizer(outline.text, add_special_tokens=False).input_ids)
        pictures = [processor.image_processor.get_number_of_image_tokens(*size) + 2 for size in outline.picture_sizes]
        lengths.append(1 + words + sum(pictures) + frame * outline.num_messages)
        if lengths[-1] > max_length:
            raise ValueError(
                f"Conversation {index} has about {lengths[-1]} tokens, {sum(pictures)} of them for pictures; more than "
                f"max_length={max_length}. Raise max_length, or lower max_num_tiles in the recipe."
            )
    return lengths


class Collator:
    """Makes a batch of conversations with a processor: model inputs and `labels`.

    Args:
        processor: of the checkpoint.
        max_length: conversations of more tokens are refused, never cut.
        always_pictures: give batches without any picture a blank one, outside of what the text attends to. The vision
            tower then takes part in every step, as data-parallel training needs it; nothing else changes.
    """

    def __init__(self, processor: Any, max_length: int, always_pictures: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.always_pictures = always_pictures

    def __call__(self, conversations: list[list[Message]]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        length = batch["input_ids"].shape[1]
        if length > self.max_length:
            raise ValueError(
                f"A conversation has {length} tokens, more than max_length={self.max_length}. Raise max_length, or "
                "lower max_num_tiles in the recipe."
            )
        said = batch.pop("assistant_masks").bool()
        labels = batch["input_ids"].masked_fill(~said, IGNORE)
        if self.always_pictures and "pixel_values" not in batch:
            return self._with_blank_tile(batch, labels)
        return {**batch, "labels": labels}

    def _with_blank_tile(self, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Append the tokens of one tile to the first row and padding to the others, all masked."""
        shape = (len(labels), self.processor.tokens_per_tile)
        ids = torch.full(shape, self.processor.tokenizer.pad_token_id)
        ids[0] = self.processor.image_token_id
        side = self.processor.image_processor.image_size
        return {
            "input_ids": torch.cat([batch["input_ids"], ids], dim=1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(shape, dtype=torch.long)], dim=1),
            "labels": torch.cat([labels, torch.full(shape, IGNORE)], dim=1),
            "pixel_values": torch.zeros(1, 3, side, side),
            "num_patches": torch.ones(1, dtype=torch.long),
        }
