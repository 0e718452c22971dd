"""A cache that a caller keeps between answers of `chat()`: keys and values, with the ids and tiles they belong to.

Because it knows what it has read, whatever a new prompt does not begin with is dropped before it is used: an answer
takes less time with a kept cache, and never depends on it.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache


class ChatCache(DynamicCache):
    """Keys and values of one prompt and its answer; `chat()` fills them and brings them up to date.

    It belongs to the model, with its adapters, that filled it. `copy.deepcopy` makes a second one for another way on.

    Attributes:
        input_ids: ids of the positions it has read.
        tiles: tiles, or features of `visual_features`, whose image tokens are among them; None without pictures.
    """

    def __init__(self) -> None:
        super().__init__()
        self.input_ids: list[int] = []
        self.tiles: torch.Tensor | None = None

    def keep_beginning_of(self, input_ids: Sequence[int], tiles: torch.Tensor | None, image_token_id: int) -> int:
        """Drop all that a prompt does not begin with; the last position of the prompt is never kept.

        Args:
            input_ids: ids of the whole prompt.
            tiles: `(num_tiles, ...)`, all its tiles, which have equally many image tokens each; None without pictures.
            image_token_id: id of the image tokens.

        Returns:
            how many of the tiles are kept.

        Raises:
            ValueError: if somebody else has cut the cache.
        """
        num_cached = int(self.get_seq_length())
        if num_cached < len(self.input_ids):
            raise ValueError(
                f"This cache holds {num_cached} positions, but chat() left {len(self.input_ids)} in it. Something else "
                "has cut it; take a new one from model.chat_cache()."
            )
        kept = _num_equal(self.input_ids, input_ids[:-1])
        kept_tiles = 0
        if tiles is not None and len(tiles):
            places = [place for place, token in enumerate(input_ids) if token == image_token_id]
            tokens_per_tile = len(places) // len(tiles)
            read_tiles = sum(place < kept for place in places) // tokens_per_tile
            kept_tiles = min(read_tiles, _num_equal_tiles(self.tiles, tiles))
            if kept_tiles < len(tiles):
                kept = min(kept, places[kept_tiles * tokens_per_tile])
        if kept < num_cached:
            self.crop(kept - num_cached)
        self.remember(input_ids, tiles[:kept_tiles] if kept_tiles else None)
        return kept_tiles

    def remember(self, input_ids: Sequence[int], tiles: torch.Tensor | None) -> None:
        """Note the ids of the positions that are in the cache by now, as the first of `input_ids`, and their tiles."""
        self.input_ids = list(input_ids[: int(self.get_seq_length())])
        self.tiles = tiles


def _num_equal(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of the common beginning."""
    pairs = zip(left, right, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def _num_equal_tiles(kept: torch.Tensor | None, tiles: torch.Tensor) -> int:
    """How many tiles at the beginning are the same, to the bit."""
    if kept is None or (kept.shape[1:], kept.dtype, kept.device) != (tiles.shape[1:], tiles.dtype, tiles.device):
        return 0
    number = min(len(kept), len(tiles))
    equal = (kept[:number] == tiles[:number]).flatten(1).all(1)
    return _num_equal(equal.tolist(), [True] * number)
