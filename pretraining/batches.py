"""Turns conversations about drawn documents into batches of token sequences in the published prompt format.

A sequence is `<|begin_of_text|>`, then per turn a user and an assistant block; the images come first, each as `<img>`,
256 `<image>` per tile, `</img>` and a line break. Only answers (with their `<|eot_id|>`) carry loss.
"""

import re
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from documents.generator import COLUMNS, ROWS_PER_PAGE, Document
from documents.questions import ABSENT, TEXT_QUESTIONS, VERDICTS, Conversation, verdict_of
from pretraining.tokenizer import MARKUP

TOKENS_PER_TILE = COLUMNS * ROWS_PER_PAGE
IGNORE_INDEX = -100  # the label of tokens without loss
ANSWER_PIECE = re.compile(f"{'|'.join(MARKUP)}|.", re.DOTALL)
SENTENCES = {ABSENT, *VERDICTS, *TEXT_QUESTIONS}  # answers that no page prints


@dataclass
class Batch:
    """Right-padded sequences.

    Attributes:
        input_ids: `(num_sequences, length)`.
        labels: like `input_ids`; -100 where there is no loss.
        pages: the documents whose tiles fill the image tokens, in order.
        conversations: those of the sequences.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pages: list[Document] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)


class Encoder:
    """Encodes conversations with a tokenizer.

    Args:
        tokenizer: nano's.
        skip_blank_rows: leave blank rows of pages out of the sequence; possible with glyph ids, and cheaper.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_blank_rows: bool = False):
        self.tokenizer = tokenizer
        self.skip_blank_rows = skip_blank_rows
        self.pad_token_id = tokenizer.pad_token_id
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.start = self.encode("<|begin_of_text|>")
        self.user = self.encode("<|start_header_id|>user<|end_header_id|>\n\n")
        self.assistant = self.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        self.end = self.encode("<|eot_id|>")
        self.glyphs = {chr(code): self.encode(chr(code))[0] for code in range(32, 127)}
        self.glyphs.update({sign: self.encode(sign)[0] for sign in "\u20ac\u00a3"})
        self.pieces = {piece: self.encode(piece) for piece in (*self.glyphs, "\n", *MARKUP)}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def image(self, page: Document) -> list[int]:
        tokens = [self.image_token_id] * (COLUMNS * len(self.rows(page)))
        return [*self.encode("<img>"), *tokens, *self.encode("</img>\n")]

    def prompt(self, conversation: Conversation, num_answered: int = 0) -> list[int]:
        """Return the ids before the answer of turn `num_answered`; earlier turns have their right answers."""
        ids, _ = self.conversation(conversation, num_answered)
        return [*ids, *self._question(conversation, num_answered)]

    def _question(self, conversation: Conversation, index: int) -> list[int]:
        images = [token for page in conversation.documents for token in self.image(page)] if index == 0 else []
        start = self.start if index == 0 else []
        return [*start, *self.user, *images, *self.encode(conversation.turns[index].question), *self.assistant]

    def answer(self, text: str) -> list[int]:
        """Return the ids of an answer: printed text one glyph a token, sentences of `SENTENCES` in whole words.

        The tokenizer has a token for "Total". To choose it the model would have to read the whole word ahead, and it
        confuses "Total" with "To:"; glyph by glyph it copies. The " and " between two values is written likewise.
        `chat()` encodes earlier answers with the tokenizer's whole words all the same.
        """
        if text in SENTENCES:
            return self.encode(text)
        verdict = verdict_of(text)
        printed = text.removesuffix(f" {verdict}") if verdict in VERDICTS else text
        pieces = [self.pieces.get(piece) or self.encode(piece) for piece in ANSWER_PIECE.findall(printed)]
        return [token for piece in pieces for token in piece] + self.encode(text.removeprefix(printed))

    def conversation(self, conversation: Conversation, num_turns: int | None = None) -> tuple[list[int], list[int]]:
        """Return `(input_ids, labels)` of the first `num_turns` turns, all by default.

        Labels are `IGNORE_INDEX` everywhere but in answers, and in the part of an answer that is `given`.
        """
        ids: list[int] = []
        labels: list[int] = []
        for index, turn in enumerate(conversation.turns[:num_turns]):
            question = self._question(conversation, index)
            given = len(self.answer(turn.given))
            answer = [*self.answer(turn.answer), *self.end]
            ids += question + answer
            labels += [IGNORE_INDEX] * (len(question) + given) + answer[given:]
        return ids, labels

    def rows(self, page: Document) -> list[int]:
        """Return the rows of a page that have visual tokens."""
        return [row for row, line in enumerate(page.lines) if line.strip() or not self.skip_blank_rows]

    def cells(self, page: Document) -> list[tuple[int, int]]:
        """Return, row by row, the token id of the glyph under each visual token and its position in the tile."""
        return [
            (self.glyphs[character], (row * COLUMNS + column) % TOKENS_PER_TILE)
            for row in self.rows(page)
            for column, character in enumerate(page.lines[row].ljust(COLUMNS))
        ]

    def batch(self, conversations: list[Conversation]) -> Batch:
        encoded = [self.conversation(conversation) for conversation in conversations]
        length = max(len(ids) for ids, _ in encoded)
        input_ids = torch.tensor([ids + [self.pad_token_id] * (length - len(ids)) for ids, _ in encoded])
        labels = torch.tensor([labels + [IGNORE_INDEX] * (length - len(labels)) for _, labels in encoded])
        pages = [page for conversation in conversations for page in conversation.documents]
        return Batch(input_ids, labels, pages, conversations)


def batches_by_length(encoder: "Encoder", conversations: list[Conversation], batch_size: int) -> list[Batch]:
    """Return batches of conversations of similar length, shortest first, so that little is padded."""
    by_length = sorted(conversations, key=lambda conversation: len(encoder.conversation(conversation)[0]))
    return [encoder.batch(by_length[start : start + batch_size]) for start in range(0, len(by_length), batch_size)]
