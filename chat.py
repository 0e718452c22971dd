"""Conversations with a model: `chat`, `chat_stream`, the history, and the cache that a caller may keep.

`ChatMixin` turns questions, history, tiles and videos into prompts, and calls the model's `generate` for the answers.
Each call gets everything that the conversation needs; nothing is stored on the model.
"""

import bisect
import contextlib
import copy
import operator
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer
from transformers.utils import logging

from .answers import MAX_EQUAL_ROWS, LoopCriteria, TokenProbabilities, confidence
from .decode_attention import mark_thread_as_lasting
from .pictures import flatten_images, open_document
from .prompts import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    THINK_END,
    THINK_START,
    V1_FORMAT,
    VIDEO_TOKEN,
    ControlTokenGuard,
    PromptFormat,
    PromptPieces,
    PromptRuns,
    encode_prompt,
    image_run,
    image_token_id_of,
    layout_of,
    leading_placeholders,
    order_of_placeholders,
    render_messages,
    split_reasoning,
    video_run,
    without_headers,
)
from .triton_kernels import runs_kernels
from .video_processing import VIDEO_OPTIONS, NemotronVLVideoProcessor, VideoInfo, group_videos

logger = logging.get_logger(__name__)

# The length of an answer if the caller gives none, as in the examples of the model card.
DEFAULT_MAX_NEW_TOKENS = 1024


class ChatCache(DynamicCache):
    """Keys and values of one prompt and its answer, with their ids and tiles. `chat()` updates the cache in place.

    `chat()` keeps the beginning that a prompt shares with the last one, and drops the rest. So a kept cache saves time
    and does not change an answer. Use a cache only with the model, and the adapters, that filled it. Use
    `copy.deepcopy` to continue a conversation in two ways.

    Attributes:
        input_ids: ids of the positions in the cache.
        tiles: the tiles (or the features given as `visual_features`) whose image tokens are among these ids; None
            without images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.input_ids: list[int] = []
        self.tiles: torch.Tensor | None = None

    def keep_beginning_of(self, input_ids: Sequence[int], tiles: torch.Tensor | None, image_token_id: int) -> int:
        """Crop the cache to its longest common beginning with a prompt, but never keep the prompt's last position.

        Args:
            input_ids: ids of the whole prompt.
            tiles: `(num_tiles, ...)`, all tiles of the prompt, with the same number of image tokens for each; None
                without images.
            image_token_id: id of the image tokens.

        Returns:
            how many of the tiles are kept.

        Raises:
            ValueError: if the cache was cropped outside of `chat()`.
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
        """Store which ids and tiles the cache now holds: as many of the first `input_ids` as it has positions."""
        self.input_ids = list(input_ids[: int(self.get_seq_length())])
        self.tiles = tiles


@dataclass
class Answer:
    """One answer of `chat()` and what it tells about itself.

    Args:
        text: the answer without its end token.
        history: the history with this turn appended.
        token_ids: ids of its tokens, without the end token.
        finish_reason: "stop" if the model or a stopping criterion ended it, "length" if all of its tokens were used,
            "loop" if `stop_loops` ended it.
        confidence: see `chat`; None without `return_confidence`.
        probabilities: of its tokens, 0..1; None without `return_confidence`.
    """

    text: str
    history: list[tuple[str, str]]
    token_ids: list[int]
    finish_reason: str
    confidence: float | None = None
    probabilities: list[float] | None = None


@dataclass
class ChatPrompt:
    """The prompt for one question of `chat()`.

    Args:
        input_ids: ids of the whole prompt.
        tiles: indices of the tiles that the prompt uses, in prompt order. Frames of videos count on behind the tiles.
        videos: indices of the videos that the prompt uses, in prompt order.
        question: the question as it goes into the history, with its placeholders.
        history: earlier `(question, answer)` pairs that are part of the prompt.
        text: the rendered prompt, one `<image>` per image and one `<video>` per video.
    """

    input_ids: list[int]
    tiles: list[int]
    videos: list[int]
    question: str
    history: list[tuple[str, str]]
    text: str

    @property
    def begins_with_reasoning(self) -> bool:
        """Whether the answer begins inside a block of reasoning."""
        return self.text.rstrip().endswith(THINK_START)

    def history_with(self, answer: str) -> list[tuple[str, str]]:
        """Return the history with this answer, but without its reasoning, which the next prompt must not contain."""
        if self.begins_with_reasoning:
            answer = split_reasoning(answer, thinking=True)[1]
        return [*self.history, (self.question, answer)]


class ChatVideos(NamedTuple):
    """The videos of a call of `chat()`.

    Attributes:
        frames: `(num_frames, 3, height, width)`, the frames of all videos; None without videos.
        infos: what is known about each video.
        groups: how many videos belong to each question; None if the caller did not say.
    """

    frames: torch.Tensor | None
    infos: list[VideoInfo]
    groups: list[int] | None

    def chosen(self, videos: list[int]) -> dict[str, Any]:
        """Return the arguments of `generate` for some of the videos."""
        frames = self.frames.split([len(info.frames_indices) for info in self.infos])
        if videos == list(range(len(self.infos))):
            pixel_values = self.frames  # not copied
        else:
            pixel_values = torch.cat([frames[video] for video in videos])
        return {"pixel_values_videos": pixel_values, "num_video_frames": [len(frames[video]) for video in videos]}


class ChatMixin:
    """`chat`, `chat_stream` and `chat_cache` for a model.

    The model has to provide what every generating model of transformers has (`generate`, `config`,
    `get_input_embeddings`, ...). It also needs `_check_images(pixel_values, visual_features)`, which raises an error
    for tensors of a wrong shape, and `prompt_format`.
    """

    prompt_format: PromptFormat

    def chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None = None,
        question: str | Sequence[str] | None = None,
        generation_config: Mapping[str, Any] | GenerationConfig | None = None,
        history: Sequence[Any] | None = None,
        return_history: bool = False,
        num_patches: torch.Tensor | Sequence[Any] | None = None,
        IMG_START_TOKEN: str = "<img>",
        IMG_END_TOKEN: str = "</img>",
        IMG_CONTEXT_TOKEN: str = "<image>",
        verbose: bool = False,
        visual_features: torch.Tensor | None = None,
        system_prompt: str | None = None,
        *,
        num_patches_list: torch.Tensor | Sequence[Any] | None = None,
        streamer: Any | None = None,
        truncation: str | None = None,
        enable_thinking: bool | None = None,
        past_key_values: ChatCache | None = None,
        document: Any = None,
        pages: str | Sequence[int] | None = None,
        password: str | None = None,
        max_num_tiles: int | str | None = None,
        return_confidence: bool = False,
        return_dict: bool = False,
        stop_loops: bool | int = False,
        video: Any = None,
        num_frames: int | None = None,
        fps: float | None = None,
        video_layout: str | None = None,
        video_pruning_rate: float | None = None,
        **video_options: Any,
    ) -> Any:
        """Answer a question, or a batch of them, about images, videos or text.

        Each `<image>` in the question and in the questions of the history marks the place of one image, in order. If
        a first question has none, one `<image>` per image is put in front of it. In a call with `video` the same holds
        for `<video>`. All other control tokens in the texts are plain text. Nothing is stored on the model, and the
        caller's objects are not changed.

        Args:
            tokenizer: the checkpoint's tokenizer, or its processor.
            pixel_values: `(num_tiles, 3, height, width)`, RGB in 0..1: the tiles of all images, those of the history
                first; None for text only.
            question: one question, or a list for a batch.
            generation_config: dict or `GenerationConfig`; without a length the answer ends after 1,024 tokens.
            history: earlier `(question, answer)` pairs, for a batch one list per question.
            return_history: also return the history with this turn appended.
            num_patches: tiles per image; None takes all tiles as one image. For a batch, give either one list per
                question or one flat list. The images of a flat list go to the placeholders in order, or one to each
                question if there are no placeholders.
            IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN: kept for old calls; only the defaults are possible.
            verbose: log the prompt, without its image tokens.
            visual_features: features instead of `pixel_values`; see `generate`.
            system_prompt: text of a system block before the conversation.
            num_patches_list: InternVL's name of `num_patches`.
            streamer: receives the tokens as they come (`TextStreamer`, `TextIteratorStreamer`); one question only.
            truncation: "oldest_turns" drops the oldest turns of the history, with their images, until prompt and
                answer fit the context, and logs a warning; None raises an error instead.
            enable_thinking: whether the 12B V2 reasons before it answers; None leaves this to `/think` and `/no_think`
                in the texts. The answer contains the reasoning (`split_reasoning` separates them), the history does
                not.
            past_key_values: a cache from `chat_cache()`, updated in place. It saves time and does not change the
                answer: the beginning that a prompt shares with the previous one is not computed again, images
                included. Pass all pixels and the history, as you do without a cache. One question only.
            document: a PDF or another document (see `open_document`), or a list of them, in place of `pixel_values`;
                its pages are the images. `tokenizer` then has to be the processor. One question only.
            pages, password: which pages of the document, such as "1-3,7", and the password of an encrypted one.
            max_num_tiles: of each page; None leaves the processor's, and "fit" takes the largest number with which all
                pages fit the context beside question and answer.
            return_confidence: also return how probable the answer is, 0..1: the product of the probabilities of its
                tokens, to the power `1 / confidence_temperature` (a key of the checkpoint's generation_config, 1
                without it). Reasoning does not count. Not with beams or drafts.
            return_dict: return an `Answer`, which also holds the ids of the tokens and why the answer ended.
            stop_loops: end an answer that repeats itself; see `LoopCriteria` for the rule. A number is the number of
                equal rows that are no loop, True means 200. Not with beams or drafts.
            video: a video or a list of videos (see `group_videos` and `read_video`), those of the history first; for a
                batch one for each question, or one list for each.
            num_frames, fps: frames taken of each video, in all or for each second of it; `NemotronVLVideoProcessor`
                says how many without both.
            video_layout: "one" or "frames", for the 8B V1; see `V1_LAYOUTS`.
            video_pruning_rate: for the 12B V2, see `generate`.
            video_options: further options of videos: `max_frames`, `video_metadata`, `do_sample_frames`, ...; see
                `NemotronVLVideoProcessor`.

        Returns:
            the answer; with `return_history` `(answer, history)`, with `return_confidence` `(answer, confidence)`, with
            both `(answer, history, confidence)`; for a batch lists of them. With `return_dict` one `Answer`, or a list.

        Raises:
            ValueError: if placeholders and images or videos differ in number, pixels lie outside 0..1, a video cannot
                be used, or the prompt does not fit the context; the message holds the numbers and the remedy.
            TypeError: for an unknown argument.
        """
        _check_image_tokens(IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        if truncation not in (None, "oldest_turns"):
            raise ValueError(f"truncation must be None or 'oldest_turns', got {truncation!r}.")
        processor, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
        videos = self._read_videos(processor, video, {"num_frames": num_frames, "fps": fps, **video_options})
        options, extra_options = self._generation_options(tokenizer, generation_config)
        write_prompts = partial(
            build_chat_prompts,
            tokenizer,
            question,
            history=history,
            image_token_id=self._image_token_id_of(tokenizer),
            image_tag_type=self.config.image_tag_type,
            # InternVL clients set their system prompt on the model.
            system_prompt=system_prompt if system_prompt is not None else getattr(self, "system_message", None),
            prompt_format=self.prompt_format,
            enable_thinking=enable_thinking,
            videos=videos.infos,
            video_groups=videos.groups,
            video_layout=video_layout,
        )
        wishes = (document, pages, password, max_num_tiles)
        if any(value is not None for value in wishes):
            given = (pixel_values, visual_features, num_patches, num_patches_list)
            if any(value is not None for value in given) or not isinstance(question, str):
                raise ValueError(
                    "document= takes the place of pixel_values and num_patches, and goes with one question."
                )
            images = _document_pages(processor, document, pages, password)
            room = self.config.max_sequence_length - (options.max_new_tokens or 1)
            drops_turns = truncation is not None and max_num_tiles != "fit"  # to make room for the pages
            features = _cut_pages(processor, images, max_num_tiles, None if drops_turns else room, write_prompts)
            pixel_values, num_patches = features["pixel_values"], features["num_patches"]
        if past_key_values is not None:
            _check_chat_cache(past_key_values, question, options)
            extra_options["past_key_values"] = past_key_values
        _check_one_path(options, extra_options, return_confidence=return_confidence, stop_loops=stop_loops)
        if video_pruning_rate is not None:
            extra_options["video_pruning_rate"] = video_pruning_rate
        tiles = visual_features if visual_features is not None else pixel_values
        if tiles is not None:
            self._check_images(pixel_values, visual_features)
        prompts = write_prompts(
            num_tiles=0 if tiles is None else len(tiles),
            num_patches=num_patches if num_patches is not None else num_patches_list,
            tokens_per_tile=self._tokens_per_tile(pixel_values, visual_features),
            max_length=self._longest_prompt(options.max_new_tokens or 1) if truncation else None,
        )
        if verbose:
            logger.warning("\n".join(prompt.text for prompt in prompts))
        if videos.infos and self.prompt_format.video_filler == IMAGE_TOKEN:
            if visual_features is not None:
                raise ValueError("A video cannot stand beside visual_features. Pass pixel_values, or no video.")
            # To the 8B V1 a frame is a tile, so that a chat cache keeps frames as well.
            tiles = videos.frames if tiles is None else torch.cat([tiles, videos.frames.to(tiles)])
        elif videos.infos:
            extra_options |= videos.chosen([video for prompt in prompts for video in prompt.videos])
        if tiles is not None:
            tiles = tiles[[tile for prompt in prompts for tile in prompt.tiles]]
        name = "pixel_values" if visual_features is None else "visual_features"
        answers = self._answer(
            tokenizer, prompts, options, extra_options, streamer, tiles, name, return_confidence, stop_loops
        )
        return _packed(answers, isinstance(question, str), return_dict, return_history, return_confidence)

    def _read_videos(self, processor: Any, video: Any, options: dict[str, Any]) -> "ChatVideos":
        """Read the frames of a call's videos, with the options of the processor, if the caller gave one.

        Raises:
            TypeError: for an unknown option.
            ValueError: for options without a video.
        """
        given = {name: value for name, value in options.items() if value is not None}
        unknown = sorted(given.keys() - {*VIDEO_OPTIONS, "input_data_format", "upscale"})
        if unknown:
            raise TypeError(f"chat() has no arguments {unknown}. Options of videos are {', '.join(VIDEO_OPTIONS)}.")
        videos, groups = group_videos(video)
        if not videos:
            if given:
                raise ValueError(f"{', '.join(sorted(given))} is an option of videos, but video= was not given.")
            return ChatVideos(None, [], None)
        video_processor = getattr(processor, "video_processor", None)
        if video_processor is None:
            video_processor = NemotronVLVideoProcessor.of_config(self.config)
        batch = video_processor(videos, **{**given, "return_metadata": True})
        return ChatVideos(batch["pixel_values_videos"], batch["video_metadata"], groups)

    def _generation_options(
        self, tokenizer: Any, generation_config: Mapping[str, Any] | GenerationConfig | None
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Return a new `GenerationConfig` with the defaults of `chat`, and the options that no such config has."""
        if isinstance(generation_config, GenerationConfig):
            options, given = copy.deepcopy(generation_config), {}
        else:
            options, given = copy.deepcopy(self.generation_config), dict(generation_config or {})
            options.eos_token_id = tokenizer.eos_token_id
        temperature = given.pop("confidence_temperature", None)  # no option of transformers
        extra_options = options.update(**given)
        if temperature is not None:
            options.confidence_temperature = temperature
        if options.eos_token_id is None:
            options.eos_token_id = tokenizer.eos_token_id
        if options.pad_token_id is None:
            pad, eos = tokenizer.pad_token_id, options.eos_token_id
            options.pad_token_id = pad if pad is not None else eos[0] if isinstance(eos, list) else eos
        if options.max_new_tokens is None and options.max_length == GenerationConfig().max_length:
            options.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
        if (options.num_return_sequences or 1) > 1:
            raise ValueError(
                f"chat() gives one answer per question, but num_return_sequences={options.num_return_sequences}. "
                "Call generate() for several."
            )
        return options, extra_options

    def _longest_prompt(self, max_new_tokens: int) -> int:
        """Return how many tokens of the context are left for a prompt if an answer may take `max_new_tokens`.

        Raises:
            ValueError: if none are left.
        """
        window = self.config.max_sequence_length
        if max_new_tokens >= window:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the context of {window} tokens, so "
                "truncation='oldest_turns' cannot say which turns fit. Ask for fewer."
            )
        return window - max_new_tokens

    def _tokens_per_tile(self, pixel_values: torch.Tensor | None, visual_features: torch.Tensor | None) -> int:
        """Return how many image tokens stand for each of these tiles.

        Raises:
            ValueError: if the sides of the tiles cannot be divided into tokens.
        """
        if visual_features is not None:
            return visual_features.shape[1]
        if pixel_values is None:
            return self.config.num_image_tokens_per_tile
        height, width = pixel_values.shape[-2:]
        side = self.config.patch_size * self.config.merge_size
        if height % side or width % side:
            raise ValueError(
                f"pixel_values holds tiles of {height}x{width} px, whose sides are not multiples of {side} px. Cut "
                f"tiles of {self.config.force_image_size} px with this checkpoint's image processor."
            )
        return (height // side) * (width // side)

    def _image_token_id_of(self, tokenizer: Any) -> int:
        """Return the tokenizer's id of `<image>`.

        Raises:
            ValueError: if the tokenizer has no such token, or the model's config names another id.
        """
        token_id = image_token_id_of(tokenizer)
        if self.config.image_token_id not in (None, token_id):
            raise ValueError(
                f"The tokenizer's <image> has id {token_id}, but config.img_context_token_id is "
                f"{self.config.image_token_id}. Load tokenizer and model from the same checkpoint."
            )
        return token_id

    def _answer(
        self,
        tokenizer: Any,
        prompts: list[ChatPrompt],
        options: GenerationConfig,
        extra_options: dict[str, Any],
        streamer: Any | None,
        tiles: torch.Tensor | None,
        name: str,
        keep_probabilities: bool,
        stop_loops: bool | int,
    ) -> list[Answer]:
        """Generate an answer to each prompt, and decode it up to its end token.

        Args:
            tiles: the tiles of all prompts in order, or features instead of them.
            name: the argument of `generate` that takes these, `pixel_values` or `visual_features`.
            keep_probabilities: keep those of the tokens.
            stop_loops: see `chat`.
        """
        ids, mask = _pad_left([prompt.input_ids for prompt in prompts], options.pad_token_id)
        cache, new_tiles = extra_options.get("past_key_values"), tiles
        if isinstance(cache, ChatCache):
            num_kept = cache.keep_beginning_of(prompts[0].input_ids, tiles, self.config.image_token_id)
            new_tiles = tiles[num_kept:] if tiles is not None and num_kept < len(tiles) else None
        if options.stop_strings is not None:
            extra_options = {"tokenizer": tokenizer, **extra_options}
        probabilities = TokenProbabilities() if keep_probabilities else None
        if probabilities:
            extra_options["logits_processor"] = [*(extra_options.get("logits_processor") or ()), probabilities]
        loops = None
        if stop_loops is not False:
            loops = LoopCriteria(tokenizer, MAX_EQUAL_ROWS if stop_loops is True else stop_loops)
            extra_options["stopping_criteria"] = [*(extra_options.get("stopping_criteria") or ()), loops]
        output = self.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            generation_config=options,
            streamer=streamer,
            **({} if new_tiles is None else {name: new_tiles}),
            **extra_options,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if isinstance(cache, ChatCache):
            cache.remember(sequences[0].tolist(), tiles)
        limit = self.config.max_sequence_length - len(ids[0])
        if options.max_new_tokens is not None:
            limit = min(limit, options.max_new_tokens)
        elif options.max_length is not None:
            limit = min(limit, options.max_length - len(ids[0]))
        kept = probabilities.of(sequences) if probabilities else [None] * len(prompts)
        loop_ends = loops.loop_ends if loops else [None] * len(prompts)
        rows = zip(prompts, sequences[:, len(ids[0]) :].tolist(), kept, loop_ends, strict=True)
        return [_finished_answer(tokenizer, *row, options=options, limit=limit) for row in rows]

    def chat_cache(self) -> ChatCache:
        """Return an empty cache for the argument `past_key_values` of `chat`; the model does not keep it.

        Raises:
            ValueError: for the 12B V2.
        """
        if self._is_stateful:
            raise ValueError(
                "The Mamba layers of this model cannot go back to where a new prompt differs from the last one, so "
                "chat() keeps no cache. Keep the images' features: generate(..., mm_encoder_outputs=...)."
            )
        return ChatCache()

    def chat_stream(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None = None,
        question: str | None = None,
        generation_config: Mapping[str, Any] | GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Generator[str, None, Any]:
        """Answer one question and yield the answer in pieces; joined and stripped they are the answer of `chat`.

        The value of `yield from chat_stream(...)` is what `chat` returns.

        The generation runs in a thread of its own. It ends before the next token if the caller leaves the loop over
        the pieces or closes the iterator. Errors of `chat` are raised in the loop. On CUDA, all streams that do not
        overlap share one thread, which keeps their compiled step (see `compile_in_this_thread`).

        Args:
            tokenizer, pixel_values, question, generation_config: as for `chat`.
            kwargs: further arguments of `chat`, except `streamer`.
        """
        options, _ = self._generation_options(getattr(tokenizer, "tokenizer", tokenizer), generation_config)
        stream = _AnswerStream(getattr(tokenizer, "tokenizer", tokenizer), options)
        with _lasting_thread.lend() if runs_kernels(self.device) else _new_thread() as pool:
            answer = pool.submit(
                self.chat, tokenizer, pixel_values, question, generation_config, streamer=stream, **kwargs
            )
            answer.add_done_callback(lambda _: stream.end())  # also after an error, so that the loop ends
            try:
                yield from stream
                return answer.result()
            finally:
                stream.abandoned = True
                wait([answer])


def build_chat_prompts(
    tokenizer: Any,
    question: str | Sequence[str],
    *,
    history: Sequence[Any] | None,
    num_tiles: int,
    num_patches: Any,
    tokens_per_tile: int,
    image_token_id: int,
    image_tag_type: str,
    system_prompt: str | None = None,
    max_length: int | None = None,
    prompt_format: PromptFormat = V1_FORMAT,
    enable_thinking: bool | None = None,
    videos: Sequence[VideoInfo] = (),
    video_groups: list[int] | None = None,
    video_layout: str | None = None,
) -> list[ChatPrompt]:
    """Turn the arguments of `chat()` into one prompt per question.

    Args:
        tokenizer: with a chat template and the image tokens.
        question: one question or a batch; `<image>` marks the place of an image, and `<video>` that of a video, if
            there are videos.
        history: `(question, answer)` pairs, for a batch one list per question.
        num_tiles: tiles given, over all images.
        num_patches: tiles per image, flat or one list per question; None: all tiles are one image.
        tokens_per_tile: visual tokens of a tile.
        image_token_id: id of `<image>`.
        image_tag_type: see `image_run`.
        system_prompt: text of a system block.
        max_length: drop the oldest turns, with their images and videos, from prompts longer than this; None keeps all.
        prompt_format: says how placeholders are written that are put in front of a question.
        enable_thinking: variable of the chat template; None leaves the choice to the texts and the template.
        videos: all videos in order.
        video_groups: how many videos belong to each question; None leaves it to the placeholders.
        video_layout: the name of one of the format's layouts; None is the default.

    Raises:
        ValueError: if images, videos, placeholders and tiles do not add up; the message holds the numbers.
        TypeError: if question or history have another form.
    """
    questions = [question] if isinstance(question, str) else question
    if not isinstance(questions, (list, tuple)) or not questions or not all(isinstance(q, str) for q in questions):
        raise TypeError(f"question must be a string or a non-empty list of strings, got {question!r}.")
    histories = [history] if isinstance(question, str) else history or [None] * len(questions)
    if len(histories) != len(questions):
        raise ValueError(f"{len(questions)} questions need as many histories, got {len(histories)}.")
    turns = [_check_history(pairs) for pairs in histories]
    tiles_per_image = _tiles_per_image(num_patches, num_tiles, questions, turns)
    videos_per_question = _videos_per_question(video_groups, len(videos), questions, turns)
    layout = layout_of(prompt_format, video_layout)
    write = partial(
        _write_prompt,
        tokenizer,
        system_prompt=system_prompt,
        image_token_id=image_token_id,
        enable_thinking=enable_thinking,
        video_header=layout.header,
        placeholders=(IMAGE_TOKEN, VIDEO_TOKEN) if videos else (IMAGE_TOKEN,),
    )
    frames_are_tiles = prompt_format.video_filler == IMAGE_TOKEN
    prompts, first_tile, first_video, first_frame = [], 0, 0, num_tiles
    for text, pairs, tile_counts, num_videos in zip(
        questions, turns, tiles_per_image, videos_per_question, strict=True
    ):
        text = str.__str__(text)  # as in ControlTokenGuard.protect
        if not pairs:
            given = {IMAGE_TOKEN: len(tile_counts), VIDEO_TOKEN: num_videos}
            missing = [token for token, number in given.items() if token not in text for _ in range(number)]
            text = leading_placeholders(missing, prompt_format) + text
        media: dict[str, list[_Medium]] = {IMAGE_TOKEN: [], VIDEO_TOKEN: []}
        for count in tile_counts:
            tiles = range(first_tile, first_tile + count)
            media[IMAGE_TOKEN].append(_Medium(image_run(count, tokens_per_tile, image_tag_type), tiles))
            first_tile += count
        for number in range(first_video, first_video + num_videos):
            num_frames = len(videos[number].frames_indices)
            run = video_run([tokens_per_tile] * num_frames, videos[number].times, layout, prompt_format.video_filler)
            frames = range(first_frame, first_frame + num_frames) if frames_are_tiles else range(0)
            media[VIDEO_TOKEN].append(_Medium(run, frames, number))
            first_frame += num_frames
        first_video += num_videos
        prompt = write(text, pairs, media)
        if max_length is not None and len(prompt.input_ids) > max_length and pairs:
            prompt = _drop_oldest_turns(prompt, media, max_length, write)
        prompts.append(prompt)
    return prompts


class _Medium(NamedTuple):
    """An image or video of a prompt: how it is written, its tiles, and the number of a video."""

    run: PromptPieces
    tiles: range
    video: int | None = None


def _write_prompt(
    tokenizer: Any,
    question: str,
    pairs: list[tuple[str, str]],
    media: dict[str, list[_Medium]],
    *,
    system_prompt: str | None,
    image_token_id: int,
    enable_thinking: bool | None,
    video_header: str,
    placeholders: Sequence[str],
) -> ChatPrompt:
    """Write the prompt for a question with its history; `media` holds its images and videos by their placeholders."""
    messages = _chat_messages(question, pairs, system_prompt)
    runs = {token: [medium.run for medium in own] for token, own in media.items()}
    ids, rendered, order = _encode_chat(
        tokenizer, messages, runs, image_token_id, enable_thinking, video_header, placeholders
    )
    left = {token: iter(own) for token, own in media.items()}
    shown = [next(left[token]) for token in order]
    return ChatPrompt(
        ids,
        [tile for medium in shown for tile in medium.tiles],
        [medium.video for medium in shown if medium.video is not None],
        question,
        pairs,
        rendered,
    )


def _drop_oldest_turns(
    prompt: ChatPrompt, media: dict[str, list[_Medium]], max_length: int, write: Callable[..., ChatPrompt]
) -> ChatPrompt:
    """Write a prompt without its oldest turns and their images and videos, as many as needed to make it fit."""
    pairs = prompt.history

    def without(num_turns: int) -> ChatPrompt:
        left = {token: own[_num_placeholders(pairs[:num_turns], token) :] for token, own in media.items()}
        return write(prompt.question, pairs[num_turns:], left)

    # A bisection, so that a history of thousands of turns is not encoded once for each turn.
    num_dropped = 1 + bisect.bisect_left(
        range(1, len(pairs)), True, key=lambda number: len(without(number).input_ids) <= max_length
    )
    dropped = pairs[:num_dropped]
    num_videos = _num_placeholders(dropped, VIDEO_TOKEN) if media[VIDEO_TOKEN] else 0
    logger.warning(
        f"The prompt has {len(prompt.input_ids)} tokens, the context leaves {max_length}: the {num_dropped} "
        f"oldest of {len(pairs)} turns are dropped, with their {_num_placeholders(dropped)} images"
        f"{f' and {num_videos} videos' if num_videos else ''}, from {dropped[0][0][:60]!r} to {dropped[-1][0][:60]!r}."
    )
    return without(num_dropped)


def _num_placeholders(pairs: list[tuple[str, str]], token: str = IMAGE_TOKEN) -> int:
    """Count the images or videos of earlier turns; only questions have any."""
    return sum(question.count(token) for question, _ in pairs)


def _encode_chat(
    tokenizer: Any,
    messages: list[dict[str, str]],
    runs: PromptRuns,
    image_token_id: int,
    enable_thinking: bool | None,
    video_header: str = "",
    placeholders: Sequence[str] = (IMAGE_TOKEN,),
) -> tuple[list[int], str, list[str]]:
    """Return the ids of the messages, the rendered text and the order of its placeholders.

    Only user messages have placeholders.
    """
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    if options and "enable_thinking" not in tokenizer.get_chat_template():
        raise ValueError(
            f"enable_thinking={enable_thinking} has no effect: the tokenizer's chat template does not read it. The 8B V1 "
            "does not reason; a foreign template of the 12B V2 may read /think or /no_think in the text instead."
        )
    guard = ControlTokenGuard(tokenizer, messages)
    safe = [
        {**message, "content": guard.protect(message["content"], placeholders if message["role"] == "user" else ())}
        for message in messages
    ]
    rendered = render_messages(
        tokenizer.apply_chat_template, safe, tokenize=False, add_generation_prompt=True, **options
    )
    runs = without_headers(rendered, runs, video_header)
    ids = encode_prompt(tokenizer, rendered, runs, image_token_id, guard.marker).input_ids
    return ids, rendered.replace(guard.marker, ""), order_of_placeholders(rendered)


def _chat_messages(question: str, pairs: list[tuple[str, str]], system_prompt: str | None) -> list[dict[str, str]]:
    if not isinstance(system_prompt, str | None):
        raise TypeError(f"system_prompt must be a string or None, got {system_prompt!r:.80}.")
    messages = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    for earlier_question, answer in pairs:
        messages += [{"role": "user", "content": earlier_question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question}]


def _check_history(history: Sequence[Any] | None) -> list[tuple[str, str]]:
    pairs = list(history or [])
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise TypeError(f"history must be a list of (question, answer) pairs of strings, got the entry {pair!r}.")
    return [(earlier_question, answer) for earlier_question, answer in pairs]


def _tiles_per_image(
    num_patches: Any, num_tiles: int, questions: Sequence[str], turns: list[list[tuple[str, str]]]
) -> list[list[int]]:
    """Distribute the images over the questions: one list of tile counts per question."""
    counts = num_patches.tolist() if hasattr(num_patches, "tolist") else num_patches
    if counts is None:
        counts = [num_tiles] if num_tiles else []
    if not isinstance(counts, (list, tuple)):
        raise TypeError(f"num_patches must be a list or tensor with the tiles of each image, got {num_patches!r}.")
    if any(isinstance(count, (list, tuple)) for count in counts):
        shared = [_whole_counts(own) for own in counts]
    else:
        counts = _whole_counts(counts)
        needed = [
            _num_placeholders(pairs) + text.count(IMAGE_TOKEN) for text, pairs in zip(questions, turns, strict=True)
        ]
        if not any(needed) and not any(turns):  # placeholders will be put in front
            needed = [len(counts)] if len(questions) == 1 else [1] * len(questions) if counts else needed
        if sum(needed) != len(counts):
            raise ValueError(
                f"The questions and their history have {sum(needed)} {IMAGE_TOKEN} placeholders but {len(counts)} "
                "images were given. Write one placeholder per image, and pass the images of earlier turns again."
            )
        images = iter(counts)
        shared = [[next(images) for _ in range(number)] for number in needed]
    total = sum(count for own in shared for count in own)
    if len(shared) != len(questions) or total != num_tiles:
        raise ValueError(
            f"num_patches={counts} describes {total} tiles of {len(shared)} questions, but {num_tiles} tiles and "
            f"{len(questions)} questions were given. Pass pixel_values and num_patches as the image processor "
            "returned them."
        )
    return shared


def _videos_per_question(
    groups: list[int] | None, num_videos: int, questions: Sequence[str], turns: list[list[tuple[str, str]]]
) -> list[int]:
    """Distribute the videos over the questions.

    Raises:
        ValueError: if there are not as many as placeholders.
    """
    marked = [
        _num_placeholders(pairs, VIDEO_TOKEN) + text.count(VIDEO_TOKEN)
        for text, pairs in zip(questions, turns, strict=True)
    ]
    if not num_videos:
        if any(_num_placeholders(pairs, VIDEO_TOKEN) for pairs in turns):
            logger.warning(
                f"The history has {VIDEO_TOKEN}, but no video was given, so it is plain text. To ask about a video of an "
                "earlier turn, pass it again."
            )
        return [0] * len(questions)
    needed = list(marked)
    if not any(marked) and not any(turns):  # placeholders will be put in front
        needed = groups or ([num_videos] if len(questions) == 1 else [1] * len(questions))
    if sum(needed) != num_videos or len(needed) != len(questions) or groups not in (None, needed):
        raise ValueError(
            f"The {len(questions)} questions and their history have {marked} {VIDEO_TOKEN} placeholders, but "
            f"{groups or num_videos} videos were given. Write one placeholder per video, and pass the videos of earlier "
            "turns again."
        )
    return needed


def _whole_counts(counts: Any) -> list[int]:
    """Return tile counts as numbers; an image has at least one tile."""
    if not isinstance(counts, (list, tuple)):
        raise TypeError(f"num_patches must be flat, or hold one list per question, got the entry {counts!r}.")
    counts = [operator.index(count) for count in counts]
    if any(count < 1 for count in counts):
        raise ValueError(f"Every image has at least one tile, got num_patches={counts}.")
    return counts


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat_stream")


class _LastingThread:
    """A thread that serves one stream after the other, because CUDA graphs belong to a thread.

    While it is lent, other streams get a new thread each, so that none waits for another.
    """

    def __init__(self) -> None:
        self.free = threading.Lock()
        self.pool = ThreadPoolExecutor(1, "chat_stream_lasting", initializer=mark_thread_as_lasting)

    @contextlib.contextmanager
    def lend(self) -> Iterator[ThreadPoolExecutor]:
        if not self.free.acquire(blocking=False):
            with _new_thread() as pool:
                yield pool
            return
        try:
            yield self.pool
        finally:
            self.free.release()


_lasting_thread = _LastingThread()
if hasattr(os, "register_at_fork"):  # not on Windows; the thread does not go on in a forked process
    os.register_at_fork(after_in_child=_lasting_thread.__init__)


class _AnswerStream(TextIteratorStreamer):
    """Yields the text of an answer without its end token, and stops the generation when the reader leaves."""

    def __init__(self, tokenizer: Any, options: GenerationConfig):
        super().__init__(tokenizer, skip_prompt=True)
        self.options = options
        self.abandoned = False

    def put(self, value: torch.Tensor) -> None:
        if self.abandoned:
            raise RuntimeError("The answer is not read any more.")  # ends generate(); chat_stream keeps it to itself
        if self.next_tokens_are_prompt:
            super().put(value)
        elif new_ids := _cut_at_eos(value.flatten().tolist(), self.options):
            super().put(torch.tensor(new_ids))


def _pad_left(rows: list[list[int]], pad_token_id: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Return rows of ids padded on the left to one length, and their attention mask."""
    length = max(map(len, rows))
    paddings = [length - len(row) for row in rows]
    ids = [[pad_token_id] * padding + row for padding, row in zip(paddings, rows, strict=True)]
    return ids, [[0] * padding + [1] * (length - padding) for padding in paddings]


def _cut_at_eos(new_ids: list[int], options: GenerationConfig) -> list[int]:
    """Return the ids before the first end token."""
    ends = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
    return new_ids[: next((i for i, token in enumerate(new_ids) if token in ends), len(new_ids))]


def _finished_answer(
    tokenizer: Any,
    prompt: ChatPrompt,
    new_ids: list[int],
    probabilities: list[float] | None,
    loop_end: int | None,
    *,
    options: GenerationConfig,
    limit: int,
) -> Answer:
    """Return the answer in a row of new ids, which may go on with end and padding tokens."""
    token_ids = _cut_at_eos(new_ids, options)
    if len(token_ids) == len(new_ids):
        while token_ids and token_ids[-1] == options.pad_token_id:  # a stopping criterion ended it before the others
            token_ids = token_ids[:-1]
    looped = loop_end is not None and loop_end <= len(token_ids)
    finish_reason = "loop" if looped else "length" if len(token_ids) >= limit else "stop"
    text = tokenizer.decode(token_ids, skip_special_tokens=False).strip()
    answer = Answer(text, prompt.history_with(text), token_ids, finish_reason)
    if probabilities is not None:
        answer.probabilities = probabilities[: len(token_ids)]
        first = _length_of_reasoning(tokenizer, token_ids) if prompt.begins_with_reasoning else 0
        temperature = getattr(options, "confidence_temperature", None) or 1.0
        answer.confidence = confidence(answer.probabilities[first:], temperature)
    return answer


def _length_of_reasoning(tokenizer: Any, token_ids: list[int]) -> int:
    """Return how many tokens of an answer are its reasoning; 0 if it has not ended."""
    ends = range(len(token_ids) + 1)
    found = bisect.bisect_left(ends, True, key=lambda end: THINK_END in tokenizer.decode(token_ids[:end]))
    return found if found < len(ends) else 0


def _check_one_path(options: GenerationConfig, extra_options: Mapping[str, Any], **wanted: bool | int) -> None:
    """Raise if the answer is searched for in ways along which its tokens cannot be watched one by one."""
    names = [name for name, value in wanted.items() if value is not False]
    has_drafts = options.prompt_lookup_num_tokens is not None or extra_options.get("assistant_model") is not None
    if names and ((options.num_beams or 1) > 1 or has_drafts):
        raise ValueError(
            f"{names[0]} follows an answer token by token, which beams and assisted decoding do not allow. Leave out "
            f"num_beams, assistant_model and prompt_lookup_num_tokens, or {names[0]}."
        )


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


def _packed(answers: "list[Answer]", is_single: bool, as_dict: bool, with_history: bool, with_confidence: bool) -> Any:
    """Return the texts of answers, and what else was wanted of them, as `chat` returns it."""
    if as_dict:
        return answers[0] if is_single else answers
    columns: list[list[Any]] = [[answer.text for answer in answers]]
    if with_history:
        columns.append([answer.history for answer in answers])
    if with_confidence:
        columns.append([answer.confidence for answer in answers])
    found = tuple(column[0] for column in columns) if is_single else tuple(columns)
    return found if len(found) > 1 else found[0]


def _cut_pages(
    processor: Any,
    images: list[Any],
    max_num_tiles: int | str | None,
    room: int | None,
    write_prompts: Callable[..., list[ChatPrompt]],
) -> Any:
    """Return the tiles of the pages of a document.

    Args:
        room: tokens of the prompt, in which text and pages have to fit; None does not check it.
        write_prompts: `build_chat_prompts` without its arguments about tiles.

    Raises:
        ValueError: if they do not fit; the message names the largest number of tiles that does.
    """
    if room is not None:
        one_tile = {"num_patches": [1] * len(images), "tokens_per_tile": processor.tokens_per_tile}
        (prompt,) = write_prompts(num_tiles=len(images), **one_tile)
        room -= len(prompt.input_ids) - len(images) * processor.tokens_of_image(1)  # the text's
        max_num_tiles = processor.fitting_options(images, max_num_tiles, room)["max_num_tiles"]
    return processor.image_processor(images, max_num_tiles=max_num_tiles)


def _document_pages(
    processor: Any, document: Any, pages: str | Sequence[int] | None, password: str | None
) -> list[Any]:
    """Return the pages of a document, or of several.

    Raises:
        TypeError: if the caller of `chat` gave no processor to cut them into tiles.
    """
    if document is None:
        raise ValueError("pages, password and max_num_tiles are options of document=, which was not given.")
    if not hasattr(processor, "image_processor"):
        raise TypeError(
            f"chat(document=...) needs the processor in place of the tokenizer, got {type(processor).__name__}. Load "
            "it with AutoProcessor."
        )
    documents = document if isinstance(document, list) else [document]
    return list(flatten_images([open_document(one, pages=pages, password=password) for one in documents]))


def _check_image_tokens(start: str, end: str, context: str) -> None:
    """Raise if a caller of `chat()` gives other image tokens than the model has."""
    if (start, end, context) != (IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN):
        raise ValueError(
            f"The image tokens of this model are <img>, </img> and <image>, not {start}, {end} and {context}. Leave "
            "these arguments out."
        )


def _check_chat_cache(cache: Any, question: Any, options: GenerationConfig) -> None:
    """Raise if a cache cannot be kept for `chat()`, or not with this question and these options."""
    if not isinstance(cache, ChatCache):
        raise TypeError(
            f"past_key_values of chat() must be a cache from model.chat_cache(), which knows the ids that it holds, "
            f"got {type(cache).__name__}. generate() takes any cache."
        )
    if not isinstance(question, str):
        raise ValueError("past_key_values keeps one conversation. Ask one question (a string) at a time.")
    if (options.num_beams or 1) > 1 or options.use_cache is False:
        raise ValueError(
            f"past_key_values cannot be kept with num_beams={options.num_beams}, use_cache={options.use_cache}. Leave "
            "both out, or past_key_values."
        )
