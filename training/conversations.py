"""Conversations for fine-tuning, read from JSON lines, and their batches.

A JSON line is `{"messages": [{"role": "user", "content": [{"type": "image", "image": "page.png"},
{"type": "text", "text": "What is the total?"}]}, {"role": "assistant", "content": "12.40"}]}`; image paths are
relative to the file. They may also stand in a list `images` beside `messages`, in the order of the image parts. Only
the assistant's messages carry loss, their end token included.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nemotron_vl.prompts import VideoPart, flatten_content
from PIL import Image
from torch.utils.data import Dataset

Message = dict[str, Any]
IGNORE_INDEX = -100  # the label of tokens without loss
FRAME = "<|start_header_id|><|end_header_id|>\n\n<|eot_id|>"  # of a message
IMAGE_KEYS = ("image", "path", "url")


class Outline(NamedTuple):
    """The data that the length of a conversation is computed from.

    Args:
        text: roles and texts of all messages.
        image_sizes: (height, width) of each image in pixels.
        num_messages: number of messages.
        name: what errors call the conversation.
    """

    text: str
    image_sizes: list[tuple[int, int]]
    num_messages: int
    name: str


class JsonLines(Dataset):
    """Conversations of a file; images stay paths until the processor opens them.

    Raises:
        ValueError: for a line that cannot be trained on; the message gives the line and the reason.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"The data {path} is no file; give a file of JSON lines, or `documents` for drawn ones.")
        self.conversations: list[list[Message]] = []
        self.names: list[str] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    self.conversations.append(read_conversation(json.loads(line), path.parent))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                self.names.append(f"{path}, line {number}")
        if not self.conversations:
            raise ValueError(f"{path} holds no conversation; write one JSON object with `messages` a line.")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> list[Message]:
        return self.conversations[index]

    def outline(self, index: int) -> Outline:
        """Return the outline of a conversation; of its images only the headers are read.

        Raises:
            ValueError: for a file that is no image.
        """
        texts, sizes = [], []
        for message in self.conversations[index]:
            text, images = flatten_content(message["content"])
            texts.append(message["role"] + text)
            for image in images:
                try:
                    with Image.open(image) as opened:
                        sizes.append(opened.size[::-1])
                except OSError as error:
                    raise ValueError(f"{self.names[index]}: the image {image} cannot be opened. {error}") from error
        return Outline("".join(texts), sizes, len(texts), self.names[index])


def read_conversation(entry: Any, folder: Path) -> list[Message]:
    """Return the messages of a JSON line with the paths of their images made absolute.

    Raises:
        ValueError: if it holds no messages, no answer, or images that are not there.
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
        raise ValueError(f"`images` names {len(listed)} more images than the messages have image parts.")
    if not any(message["role"] == "assistant" and message["content"] for message in found):
        raise ValueError("no message of the assistant, so there is nothing to learn from.")
    return found


def _with_paths(content: Any, listed: list[str], folder: Path) -> Any:
    """Give the image parts of a message absolute paths; parts without one take the next of `listed`."""
    _, media = flatten_content(content)  # raises an error for content of another form
    if any(isinstance(medium, VideoPart) for medium in media):
        raise ValueError("a message has a part of type 'video'; training takes images. Give frames as images.")
    if content is None or isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, dict) and part["type"] != "text":
            name = next((part[key] for key in IMAGE_KEYS if part.get(key)), None)
            name = listed.pop(0) if name is None and listed else name
            if not isinstance(name, str) or not (folder / name).is_file():
                raise ValueError(f"the image {name!r:.80} is no file in {folder}; give its path relative to that.")
            part = {"type": "image", "image": str(folder / name)}
        parts.append(part)
    return parts


def lengths_of(outlines: Iterable[Outline], processor: Any, max_length: int) -> list[int]:
    """Return the number of tokens of each conversation, exact up to a few tokens a message.

    Raises:
        ValueError: if one is longer than `max_length`.
    """
    frame = len(processor.tokenizer(FRAME, add_special_tokens=False).input_ids)
    lengths = []
    for outline in outlines:
        words = len(processor.tokenizer(outline.text, add_special_tokens=False).input_ids)
        images = [processor.image_processor.get_number_of_image_tokens(*size) + 2 for size in outline.image_sizes]
        lengths.append(1 + words + sum(images) + frame * outline.num_messages)
        if lengths[-1] > max_length:
            raise ValueError(
                f"{outline.name} has about {lengths[-1]} tokens, {sum(images)} of them for images; more than "
                f"max_length={max_length}. Raise max_length, or lower max_num_tiles in the recipe."
            )
    return lengths


class Collator:
    """Makes a batch of conversations with a processor: model inputs and `labels`.

    Args:
        processor: of the checkpoint.
        max_length: most tokens of a conversation; a longer one is an error, it is never cut.
        always_images: give batches without any image a blank tile that is masked everywhere. The vision tower then
            takes part in every step, as data-parallel training needs it; the loss does not change.
    """

    def __init__(self, processor: Any, max_length: int, always_images: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.always_images = always_images

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
        is_answer = batch.pop("assistant_masks").bool()
        labels = batch["input_ids"].masked_fill(~is_answer, IGNORE_INDEX)
        if self.always_images and "pixel_values" not in batch:
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
            "labels": torch.cat([labels, torch.full(shape, IGNORE_INDEX)], dim=1),
            "pixel_values": torch.zeros(1, 3, side, side),
            "num_patches": torch.ones(1, dtype=torch.long),
        }
