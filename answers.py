"""What an answer tells about itself: how probable its tokens were, and whether it has run into a loop.

Both work inside transformers' `generate`. `TokenProbabilities` is a logits processor that keeps the probability of
every token of an answer, `LoopCriteria` a stopping criterion that ends answers which repeat themselves. `chat` makes
them for its options `return_confidence` and `stop_loops`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria

# No page that fills the tiles has more rows than this: 2,048 px hold 200 rows of 10 px.
MAX_EQUAL_ROWS = 200
LEAST_REPETITIONS = 4  # of a cycle, before anything is called a loop
# Words, dots or dashes that repeat inside one line; no line of a page has as many tokens.
LONGEST_LINE = 256
# 200 rows of more tokens than this do not fit into the context of the 8B V1, so they are no table.
LONGEST_ROW = 80
LONG_CYCLES = (2048, 6)  # tokens and repetitions after which a cycle longer than LONGEST_ROW is a loop
LONGEST_CYCLE = 1024
ROW_ENDS = ("\n", "</tr>", "\\\\")
SEPARATORS = (*ROW_ENDS, "|", "&", ",", ";", "<", "{", "\t")


def confidence(probabilities: Sequence[float], temperature: float = 1.0) -> float:
    """Return the probability of a text: the product of its tokens' probabilities, to the power `1 / temperature`.

    Args:
        probabilities: of the tokens of the text, each given those before it, 0..1.
        temperature: fitted on answers whose truth is known, so that of the texts with confidence 0.8 four in five
            are right; 1 changes nothing.

    Returns:
        0..1; 1 for a text without tokens.
    """
    if not temperature > 0:
        raise ValueError(f"The temperature of a confidence must be above 0, got {temperature}.")
    if any(probability <= 0 for probability in probabilities):
        return 0.0
    return math.exp(sum(map(math.log, probabilities)) / temperature)


class TokenProbabilities(LogitsProcessor):
    """Keeps the probability that the model gave to each token of an answer. It changes no score.

    Put it last among the logits processors: the probabilities are then those after a grammar or a ban, and before
    temperature, top-k and top-p, which transformers applies afterwards. It serves one call of `generate`, greedy or
    sampled. It cannot follow beams or drafts, which compute scores for tokens that are not taken.
    """

    def __init__(self) -> None:
        self._steps: list[torch.Tensor] = []  # (batch,) log-probabilities of the tokens taken at each step
        # (batch, vocab_size) of the step whose token is not known yet, and the place that the token will have
        self._scores: torch.Tensor | None = None
        self._place = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids)
        self._scores, self._place = scores.float(), input_ids.shape[1]
        return scores

    def _take(self, input_ids: torch.Tensor) -> None:
        if self._scores is not None:
            token = input_ids[:, self._place : self._place + 1].to(self._scores.device)
            self._steps.append(self._scores.gather(1, token)[:, 0] - self._scores.logsumexp(1))
            self._scores = None

    def of(self, sequences: torch.Tensor) -> list[list[float]]:
        """Return the probabilities of each row's tokens after the prompt, 0..1, up to the end of the longest row.

        Args:
            sequences: `(batch, length)` ids of prompts and answers, as `generate` returns them.
        """
        self._take(sequences)
        return torch.stack(self._steps, 1).exp().tolist() if self._steps else [[] for _ in sequences]


class LoopCriteria(StoppingCriteria):
    """Ends the answers that have run into a loop, each row of a batch for itself. Not for beams or drafts.

    The rule looks at the exact cycle at the end of an answer: the shortest stretch of tokens that, repeated, makes up
    the end. From its fourth repetition on, a cycle is a loop

    * when it holds a separator (line break, `</tr>`, `\\\\` of LaTeX, `|`, `&`, `,`, `;`, `<`, `{`, tab) and makes more
      than `max_equal_rows` rows. A repetition has as many rows as it has row ends (the first three), at least one;
    * when it holds none, so that all is one line of words, dots or dashes, and has taken more than 256 tokens;
    * when it is longer than 80 tokens, and has taken 2,048 tokens and six repetitions.

    So a table of 200 equal rows of up to 80 tokens does not end early. A loop with a period of `p` tokens ends after
    at most `max(258, 202 * p)` tokens for `p` up to 80, and `max(2048, 6 * p) + p` for `p` from 81 to 1,024.

    Args:
        tokenizer: decodes cycles.
        max_equal_rows: more equal rows than this are a loop.
    """

    def __init__(self, tokenizer: Any, max_equal_rows: int = MAX_EQUAL_ROWS):
        if isinstance(max_equal_rows, bool) or not isinstance(max_equal_rows, int) or max_equal_rows < 1:
            raise ValueError(f"The number of equal rows must be a whole number from 1 on, got {max_equal_rows!r}.")
        self.tokenizer = tokenizer
        self.max_equal_rows = max_equal_rows
        # For each row the number of tokens of its answer when it ran into a loop. Padding behind an answer that has
        # ended is a loop too, with a number beyond its end.
        self.loop_ends: list[int | None] = []
        self._rows: list[_Cycles] = []
        self._num_seen = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self._rows:
            self._rows = [_Cycles(self.tokenizer, self.max_equal_rows) for _ in input_ids]
            self._num_seen = input_ids.shape[1] - 1  # the criterion is first asked after the first token
        for row, new_ids in zip(self._rows, input_ids[:, self._num_seen :].tolist(), strict=True):
            row.extend(new_ids)
        self._num_seen = input_ids.shape[1]
        self.loop_ends = [row.loop_end for row in self._rows]
        return torch.tensor([end is not None for end in self.loop_ends], device=input_ids.device)


class _Cycles:
    """The cycles at the end of one answer."""

    def __init__(self, tokenizer: Any, max_equal_rows: int):
        self.tokenizer = tokenizer
        self.max_equal_rows = max_equal_rows
        self.num_tokens = 0
        self.loop_end: int | None = None
        self._latest = np.full(LONGEST_CYCLE, -1)  # the last ids, newest first
        # For each period, how many of the last ids equal the ids one period before them.
        self._num_equal = np.zeros(LONGEST_CYCLE, dtype=np.int64)
        self._needed = np.arange(1, LONGEST_CYCLE + 1) * (LEAST_REPETITIONS - 1)
        self._texts: dict[bytes, tuple[int, bool]] = {}

    def extend(self, new_ids: list[int]) -> None:
        for token in new_ids:
            self._num_equal += 1
            self._num_equal *= self._latest == token
            self._latest[1:] = self._latest[:-1]
            self._latest[0] = token
            self.num_tokens += 1
            if self.loop_end is None and self._is_loop():
                self.loop_end = self.num_tokens

    def _is_loop(self) -> bool:
        repeated = self._num_equal >= self._needed
        index = int(repeated.argmax())
        if not repeated[index]:
            return False
        period = index + 1
        num_tokens = int(self._num_equal[index]) + period
        repetitions = num_tokens // period
        num_rows, is_line = self._describe(self._latest[:period][::-1])
        if period > LONGEST_ROW and num_tokens >= LONG_CYCLES[0] and repetitions >= LONG_CYCLES[1]:
            return True
        return num_tokens > LONGEST_LINE if is_line else repetitions * num_rows > self.max_equal_rows

    def _describe(self, cycle: np.ndarray) -> tuple[int, bool]:
        """Return how many rows a cycle makes, and whether it is part of one line."""
        key = cycle.tobytes()
        if key not in self._texts:
            once, twice = (self.tokenizer.decode(cycle.tolist() * times) for times in (1, 2))
            # A row end may lie across the seam of two repetitions.
            num_rows = max(twice.count(end) - once.count(end) for end in ROW_ENDS)
            self._texts[key] = max(1, num_rows), not any(mark in twice for mark in SEPARATORS)
        return self._texts[key]
