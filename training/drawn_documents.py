"""The data set of recipes with `data: documents`: conversations about documents that the repository draws."""

from torch.utils.data import Dataset

from documents.drawing import draw, random_style
from documents.generator import COLUMNS
from documents.questions import Conversation, training_conversation
from training.conversations import Message, Outline


class DrawnDocuments(Dataset):
    """Conversations about drawn documents; those of an index are always the same.

    Args:
        size: number of conversations.
        first_seed: seed of the first one; two datasets whose seeds do not overlap share none.
        kinds: of documents, all of `KINDS` by default.
    """

    def __init__(self, size: int, first_seed: int = 0, kinds: list[str] | None = None):
        self.size = size
        self.first_seed = first_seed
        self.options = {"kinds": tuple(kinds)} if kinds else {}

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> Conversation:
        return training_conversation(self.first_seed + index, **self.options)

    def __getitem__(self, index: int) -> list[Message]:
        seed = self.first_seed + index
        conversation = self.conversation(index)
        messages: list[Message] = []
        images = [draw(page, random_style(seed + number), seed) for number, page in enumerate(conversation.documents)]
        for turn in conversation.turns:
            parts = [{"type": "image", "image": image} for image in images]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            images = []  # the first question brings them
        return messages

    def outline(self, index: int) -> Outline:
        conversation = self.conversation(index)
        styles = [random_style(self.first_seed + index + number) for number in range(len(conversation.documents))]
        sizes = [
            (style.cell_height * len(page.lines), style.cell_width * COLUMNS)
            for page, style in zip(conversation.documents, styles, strict=True)
        ]
        text = "".join(f"user{turn.question}assistant{turn.answer}" for turn in conversation.turns)
        return Outline(text, sizes, 2 * len(conversation.turns), f"The drawn document {index}")
