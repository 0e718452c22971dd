"""The data set of recipes with `data: documents`: conversations about documents that the repository draws."""

from torch.utils.data import Dataset

from documents.drawing import draw
from documents.questions import Conversation, training_conversation
from documents.typesetting import Print, set_page
from training.conversations import Message, Outline


class DrawnDocuments(Dataset):
    """Conversations about drawn documents; those of an index are always the same.

    Args:
        size: number of conversations.
        first_seed: seed of the first one; two datasets whose seeds do not overlap share none.
        kinds: of documents, all of `documents.contents.KINDS` by default.
    """

    def __init__(self, size: int, first_seed: int = 0, kinds: list[str] | None = None):
        self.size = size
        self.first_seed = first_seed
        self.kinds = tuple(kinds) if kinds else None

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> Conversation:
        return training_conversation(self.first_seed + index, kinds=self.kinds)

    def prints(self, conversation: Conversation, index: int) -> list[Print]:
        """Return the pages of a conversation set in type."""
        seed = self.first_seed + index
        return [set_page(page, seed + number) for number, page in enumerate(conversation.documents)]

    def __getitem__(self, index: int) -> list[Message]:
        conversation = self.conversation(index)
        messages: list[Message] = []
        images = [draw(printed, self.first_seed + index) for printed in self.prints(conversation, index)]
        for turn in conversation.turns:
            parts = [{"type": "image", "image": image} for image in images]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            images = []  # the first question brings them
        return messages

    def outline(self, index: int) -> Outline:
        conversation = self.conversation(index)
        sizes = [(printed.height, printed.width) for printed in self.prints(conversation, index)]
        text = "".join(f"user{turn.question}assistant{turn.answer}" for turn in conversation.turns)
        return Outline(text, sizes, 2 * len(conversation.turns), f"The drawn document {index}")
