"""The `AutoProcessor` of Nemotron Nano VL: from messages, images and videos to prompt ids and tiles.

The chat template renders a prompt, `prompts.py` expands its `<image>` and `<video>` placeholders to the tiles of their
images and videos, `image_processing.py` cuts the images into tiles, and `video_processing.py` makes tiles of the
frames of videos. This file handles options, padding and templates.
"""

import inspect
import json
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.data.data_collator import pad_without_fast_tokenizer_warning
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
    render_jinja_template,
)

from .image_processing import MAX_NUM_TILES, NemotronVLImageProcessor, explain_damage, natural_size, plan_pages
from .image_processing import OPTIONS as IMAGE_OPTIONS
from .pictures import Document, is_document, is_page, open_document
from .prompts import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    TOKEN_TYPES,
    V1_FORMAT,
    V2_FORMAT,
    VIDEO_TOKEN,
    ControlTokenGuard,
    PromptFormat,
    PromptIds,
    PromptPieces,
    PromptRuns,
    VideoLayout,
    VideoPart,
    count_placeholders,
    encode_prompt,
    flatten_content,
    image_run,
    image_token_id_of,
    layout_of,
    placeholder_of,
    private_backend,
    render_messages,
    render_run,
    replacement_offsets,
    split_content,
    split_reasoning,
    video_run,
    without_headers,
)
from .video_processing import VIDEO_OPTIONS, NemotronVLVideoProcessor, VideoInfo, group_videos

# A template that matches this reads the parts of a content itself. Others, like the published one, need a string.
READS_PARTS = re.compile(r"""\[\s*["'](type|text)["']\s*\]|\.(type|text)\b""")
FIT = "fit"  # max_num_tiles: the largest number with which all images of a prompt fit the context
ANSWER_TOKENS = 1024  # that is left for the answer, as much as chat() lets an answer take
LONGEST_CONTEXT = 1 << 40  # tokens; a tokenizer that states no length has a larger one
PLAN_OPTIONS = ("context_length", "answer_tokens")
# Options of images that hold for videos as well when they are given by name.
OPTIONS_FOR_BOTH = (
    *(
        "image_size",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "do_convert_rgb",
        "device",
    ),
)
MAX_PADDING = 1 << 24  # tokens; a wrong option must not take all memory

TEXT_OPTIONS = (
    "padding",
    "truncation",
    "max_length",
    "padding_side",
    "pad_to_multiple_of",
    "add_special_tokens",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
    "return_tensors",
    *PLAN_OPTIONS,
)
# How a video is written; the first names a layout, the others replace its parts.
LAYOUT_OPTIONS = ("video_layout", "video_header", "frame_label", "timed_frame_label", "frame_separator")
# Audio is refused, so its options, which some clients always send, are accepted and ignored.
OTHER_MODALITIES = ("audio", "audios")
IGNORED_MEDIA_OPTIONS = ("sampling_rate", "audio_kwargs")
NESTED_OPTIONS = ("images_kwargs", "text_kwargs", "videos_kwargs", "common_kwargs")
CALL_OPTIONS = (
    *(*TEXT_OPTIONS, *IMAGE_OPTIONS, *VIDEO_OPTIONS, *LAYOUT_OPTIONS, *NESTED_OPTIONS),
    *("images", "videos", "load_audio_from_video", *OTHER_MODALITIES, *IGNORED_MEDIA_OPTIONS),
)
# Options that a tokenizer may have been loaded with: from_pretrained(..., padding="max_length", max_length=512).
TOKENIZER_DEFAULTS = ("padding", "truncation", "max_length", "pad_to_multiple_of")
# An option of transformers' own `apply_chat_template` that is always on here.
IGNORED_TEMPLATE_OPTIONS = ("sanitize_control_tokens",)


class NemotronVLTokenizer(PreTrainedTokenizerFast):
    """Loads a tokenizer as a plain `PreTrainedTokenizerFast`, or says where to get one.

    The root of the repository and v2/ name it for AutoTokenizer, because they hold all but the tokenizer.json.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> PreTrainedTokenizerFast:
        """Load as `PreTrainedTokenizerFast.from_pretrained` does.

        Raises:
            OSError: if tokenizer.json is absent or damaged.
        """
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:  # the tokenizers library raises no narrower one for a damaged file
            raise OSError(
                f"{pretrained_model_name_or_path} has no usable tokenizer.json. This repository does not ship the "
                "tokenizers of the released models: `python -m tools.adopt` brings them along with the weights of a "
                'download, and subfolder="nano" loads a small model that is complete.'
            ) from error
        tokenizer.init_kwargs.pop("auto_map", None)  # would be saved again
        return tokenizer


class NemotronVLProcessor(ProcessorMixin):
    """Joins the image processor and the tokenizer of a Nemotron Nano VL checkpoint.

    Args:
        image_processor: a `NemotronVLImageProcessor`.
        tokenizer: the checkpoint's tokenizer, with the image tokens.
        chat_template: Jinja template; defaults to the tokenizer's.
        image_tag_type: how an image is written in the prompt, the `image_tag_type` of the model's config.

    Raises:
        ValueError: if the tokenizer has no `<image>` token.
    """

    prompt_format = V1_FORMAT
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_tag_type: str = "internvl",
    ):
        self.image_token = IMAGE_TOKEN
        self.image_token_id = image_token_id_of(tokenizer)
        self.image_tag_type = image_tag_type
        self.video_token = VIDEO_TOKEN
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read processor_config.json as transformers does; a damaged file raises an error that names it."""
        with explain_damage("processor_config.json", pretrained_model_name_or_path):
            return super().get_processor_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> list[Any]:
        """Load image processor and tokenizer by our own code: an `auto_map` in their files is never followed."""
        kwargs.pop("trust_remote_code", None)
        # transformers 4.57 may have run image_processing.py again meanwhile; pickle needs the class of the latest run.
        image_processing = sys.modules[NemotronVLImageProcessor.__module__]
        image_processor = image_processing.NemotronVLImageProcessor.from_pretrained(
            pretrained_model_name_or_path, **kwargs
        )
        tokenizer = NemotronVLTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer.padding_side = "left"  # new tokens are added on the right
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # without token_type_ids
        return [image_processor, tokenizer]

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: 256 for 512 px."""
        return self.image_processor.tokens_per_tile

    @property
    def video_processor(self) -> NemotronVLVideoProcessor:
        """The video processor, with the options of the image processor; changes to it are not kept."""
        return NemotronVLVideoProcessor.of_images(self.image_processor)

    @property
    def video_token_id(self) -> int | None:
        """The id that stands for parts of videos: that of `<video>`, for the 8B V1 that of `<image>`."""
        return self.tokenizer.convert_tokens_to_ids(self.prompt_format.video_filler)

    @property
    def image_token_ids(self) -> list[int]:
        """Ids that belong to an image or a video: the visual token, its start and its end."""
        tokens = [self.prompt_format.video_filler, IMAGE_START_TOKEN, IMAGE_END_TOKEN]
        return list(dict.fromkeys([self.image_token_id, *self.tokenizer.convert_tokens_to_ids(tokens)]))

    @property
    def model_input_names(self) -> list[str]:
        return [
            *self.tokenizer.model_input_names,
            *self.image_processor.model_input_names,
            *NemotronVLVideoProcessor.model_input_names,
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenise rendered prompts, cut their images into tiles, and make a tile of each frame of their videos.

        `text` is trusted: it is a prompt that the chat template has rendered, in which control tokens are control
        tokens. For text of users, call `apply_chat_template(..., tokenize=True)`.

        Args:
            images: one image, a flat list over the whole batch in the order of the placeholders, or one list per
                text; anything the image processor takes.
            text: one prompt or a batch, each with one `<image>` per image and one `<video>` per video.
            videos: one video, a flat list over the whole batch, or one list per text (see `group_videos`). A video is
                whatever `read_video` takes.
            kwargs: options of the image processor (`max_num_tiles`, which may also be "fit": the largest number with
                which the images of every prompt fit the context), `answer_tokens` (what "fit" and the pages of
                documents leave for the answer, 1,024) and `context_length` (by default the tokenizer's
                `model_max_length`), options of the tokenizer
                (`padding`, `max_length`, ...), of the video processor (`num_frames`, `fps`, `video_metadata`, ...),
                `return_tensors`, `return_mm_token_type_ids`, `return_text_replacement_offsets`; also nested as
                `images_kwargs`, `text_kwargs`, `videos_kwargs` and `common_kwargs`. `video_layout` names how videos
                are written ("one" or "frames" for the 8B V1); `video_header`, `frame_label`, `timed_frame_label` and
                `frame_separator` replace its parts, see `VideoLayout`. `audio` and `audios` must be empty: the models
                have no ears, and the sound of a video is left out.

        Returns:
            `input_ids` and `attention_mask`, with images `pixel_values` and `num_patches`, and with videos
            `pixel_values_videos`, `(num_frames, 3, image_size, image_size)`, and `num_video_frames`, the frames of each
            video. Padding is on the left, and a bos token is added if the prompt has none. On request also
            `mm_token_type_ids` (1 for the visual tokens of an image and the `<img>` and `</img>` around them, 2 for
            those of a video), `text_replacement_offsets` (see `replacement_offsets`) and `video_metadata`. The 8B V1
            writes images and videos with the same token, so a prompt with both always gets `mm_token_type_ids`. A
            client that cannot pass `num_patches` on sets `image_processor.model_input_names = ["pixel_values"]`; the
            model does not need it.

        Raises:
            ValueError: if placeholders and images or videos differ in number, if the pages of documents do not fit the
                context (the message names the largest `max_num_tiles` that fits), for audio, if a truncation would cut
                an image or a video, or for an option that is given twice.
            TypeError: for an unknown option.
        """
        if images is None and text is None and videos is None:
            raise ValueError("Give the processor images, text or both, or videos; it got nothing.")
        texts = [text] if isinstance(text, str) else text
        if texts is not None and not (
            isinstance(texts, (list, tuple)) and texts and all(isinstance(one, str) for one in texts)
        ):
            raise TypeError(f"text must be a string or a non-empty list of strings, got {text!r:.80}.")
        data, return_tensors, _ = self._encode(images, videos, texts, kwargs)
        return _as_batch(data, return_tensors)

    def _encode(
        self,
        images: Any,
        videos: Any,
        texts: Sequence[str] | None,
        options: dict[str, Any],
        marker: str | None = None,
        return_starts: bool = False,
    ) -> tuple[dict[str, Any], str | None, list[list[int]]]:
        """Do what `__call__` does, and also return `return_tensors` and the place in its text where each id starts."""
        images_kwargs, text_kwargs, videos_kwargs = self._split_options(options)
        return_tensors = text_kwargs.pop("return_tensors", None)
        data: dict[str, Any] = {}
        starts: list[list[int]] = []
        flat_images, images_per_text = group_images(images)
        flat_videos, videos_per_text = group_videos(videos)
        layout_kwargs = {name: videos_kwargs.pop(name, None) for name in LAYOUT_OPTIONS}
        layout = _layout(self.prompt_format, layout_kwargs)
        wants_metadata = videos_kwargs.pop("return_metadata", None)
        infos: list[VideoInfo] = []
        if flat_videos:
            frames = self.video_processor(flat_videos, **videos_kwargs, return_metadata=True)
            infos = frames["video_metadata"]

        def write_runs(num_tiles: Sequence[int]) -> list[PromptRuns]:
            written = {
                IMAGE_TOKEN: [image_run(int(tiles), self.tokens_per_tile, self.image_tag_type) for tiles in num_tiles],
                VIDEO_TOKEN: [self._video_run(info, layout) for info in infos],
            }
            runs = _runs_of_texts(texts, written, {IMAGE_TOKEN: images_per_text, VIDEO_TOKEN: videos_per_text})
            return [without_headers(text, own, layout.header) for text, own in zip(texts, runs, strict=True)]

        plan_kwargs = {name: text_kwargs.pop(name) for name in PLAN_OPTIONS if name in text_kwargs}
        if images_kwargs.get("max_num_tiles") == FIT and texts is None:
            raise ValueError(f"max_num_tiles={FIT!r} needs the prompts that the images have to fit with, as text=.")
        if images_kwargs.get("max_num_tiles") == FIT or (texts is not None and any(map(is_page, flat_images))):
            flat_images, images_kwargs = self._fit_context(
                flat_images, texts, write_runs, images_kwargs, marker, **plan_kwargs
            )
        features = self.image_processor(flat_images, **images_kwargs)  # refuses unknown options without images, too
        if flat_images:
            data.update({name: features[name] for name in self.image_processor.model_input_names})
        if flat_videos:
            wanted = (*NemotronVLVideoProcessor.model_input_names, *(["video_metadata"] if wants_metadata else []))
            data.update({name: frames[name] for name in wanted})
        if texts is not None:
            add_bos = text_kwargs.pop("add_special_tokens", True)
            wants_offsets = text_kwargs.pop("return_text_replacement_offsets", False)
            if flat_images and flat_videos and self.prompt_format.video_filler == IMAGE_TOKEN:
                text_kwargs["return_mm_token_type_ids"] = True  # nothing else tells the model which is which
            runs = write_runs(features["num_patches"])
            prompts = self._encode_texts(texts, runs, add_bos, marker, return_starts)
            encoded, starts = self._pad(prompts, **text_kwargs)
            data = {**encoded, **data}
            if wants_offsets:
                pairs = zip(texts, runs, strict=True)
                data["text_replacement_offsets"] = [replacement_offsets(text, own, marker) for text, own in pairs]
        return data, return_tensors, starts

    @staticmethod
    def open_document(source: Any, **options: Any) -> Document:
        """Open a PDF, or an image file with several frames, as a sequence of pages, each of which is an image.

        Args:
            source: a path, a `file:` or `data:` URL, bytes, a file or a PIL image.
            options: `pages` ("1-3,7") and `password`; see the function of this name in `pictures.py`.
        """
        return open_document(source, **options)

    def fitting_options(
        self, images: Sequence[Any], max_num_tiles: int | str | None, room: int, **images_kwargs: Any
    ) -> dict[str, Any]:
        """Return the image processor's option `max_num_tiles` for images that have to fit into some tokens.

        Args:
            images: in any form that the image processor takes one in, pages of documents among them.
            max_num_tiles: of each image; None is the image processor's own, and "fit" the largest that fits.
            room: tokens that all images may take together.
            images_kwargs: other options of the image processor.

        Raises:
            ValueError: if the images do not fit; the message names the largest number of tiles that does.
        """
        options = self.image_processor.with_options(images_kwargs)
        sizes = [natural_size(image) for image in options.load_images(images, images_kwargs.get("input_data_format"))]
        wished = (
            options.tiling if max_num_tiles in (None, FIT) else replace(options.tiling, max_num_tiles=max_num_tiles)
        )
        # A tile and an image cost more than image tokens: `<img>` and `</img>`, and the tags of nvlm, which are text. The
        # longest tag of a tile is that of the last one.
        costs = [self.tokens_of_image(number) for number in (1, MAX_NUM_TILES - 1, MAX_NUM_TILES)]
        plan = partial(
            plan_pages,
            sizes,
            wished,
            answer_tokens=0,
            tokens_per_tile=costs[2] - costs[1],
            tokens_around_image=costs[0] - self.tokens_per_tile,
        )
        fitting = plan(context_length=room)
        if not fitting.fits:
            raise ValueError(
                f"{len(sizes)} pages or images take {fitting.num_tokens:,} tokens with one tile each, and the context "
                f"leaves {max(room, 0):,} beside the text and the answer. Ask about fewer of them at a time: so small, "
                f"{max(room, 0) // costs[0]} fit."
            )
        if max_num_tiles != FIT and fitting.max_num_tiles < wished.max_num_tiles:
            all_tokens = plan(context_length=sys.maxsize).num_tokens
            raise ValueError(
                f"{len(sizes)} pages or images take {all_tokens:,} tokens with at most {wished.max_num_tiles} tiles "
                f"each, and the context leaves {room:,} beside the text and the answer. They fit with "
                f"max_num_tiles={fitting.max_num_tiles}; max_num_tiles={FIT!r} takes that number."
            )
        return {"max_num_tiles": fitting.max_num_tiles}

    def tokens_of_image(self, num_tiles: int) -> int:
        """Return how many tokens an image of so many tiles, thumbnail included, takes in a prompt."""
        run = image_run(num_tiles, self.tokens_per_tile, self.image_tag_type)
        return len(encode_prompt(self.tokenizer, IMAGE_TOKEN, {IMAGE_TOKEN: [run]}, self.image_token_id).input_ids)

    def _fit_context(
        self,
        images: list[Any],
        texts: Sequence[str],
        write_runs: Callable[[Sequence[int]], list[PromptRuns]],
        images_kwargs: dict[str, Any],
        marker: str | None,
        context_length: int | None = None,
        answer_tokens: int | None = None,
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the images, read, and their options with a number of tiles with which every text fits the context.

        Args:
            write_runs: returns the runs of each text from the tiles of each image.

        Raises:
            ValueError: if the wished number does not fit, before any page is drawn.
        """
        images_kwargs = dict(images_kwargs)
        max_num_tiles = images_kwargs.pop("max_num_tiles", None)
        context_length = self.tokenizer.model_max_length if context_length is None else context_length
        if max_num_tiles == FIT and context_length > LONGEST_CONTEXT:
            raise ValueError(
                f"max_num_tiles={FIT!r} needs the length of the context, which the tokenizer does not state: pass "
                "context_length=model.config.max_sequence_length."
            )
        options = self.image_processor.with_options(images_kwargs)
        loaded = options.load_images(images, images_kwargs.get("input_data_format"))
        runs = write_runs([1] * len(loaded))
        prompts = self._encode_texts(texts, runs, True, marker, False)
        remaining, fitting = iter(loaded), []
        for prompt, text_runs in zip(prompts, runs, strict=True):
            own = text_runs[IMAGE_TOKEN]
            other_tokens = len(prompt.input_ids) - len(own) * self.tokens_of_image(1)
            room = context_length - other_tokens - (ANSWER_TOKENS if answer_tokens is None else answer_tokens)
            if own:
                own_images = [next(remaining) for _ in own]
                fitting.append(self.fitting_options(own_images, max_num_tiles, room, **images_kwargs))
        return loaded, {**images_kwargs, **min(fitting, key=lambda option: option["max_num_tiles"], default={})}

    def _video_run(self, info: VideoInfo, layout: VideoLayout) -> PromptPieces:
        counts = [self.tokens_per_tile] * len(info.frames_indices)
        return video_run(counts, info.times, layout, self.prompt_format.video_filler)

    def _split_options(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Split the options of a call, also nested and common ones, into those for images, text and videos."""
        flat = {name: value for name, value in options.items() if name not in IGNORED_MEDIA_OPTIONS}
        for name in OTHER_MODALITIES:
            given = flat.pop(name, None)
            if given is not None and len(given):
                raise ValueError(f"This model takes no {name}; it has no audio encoder. Leave {name} out.")
        if flat.pop("load_audio_from_video", None):
            raise ValueError(
                "load_audio_from_video=True cannot be had: this model has no audio encoder. Leave it out."
            )
        nested = {name: dict(flat.pop(name, None) or {}) for name in NESTED_OPTIONS}
        named = (*VIDEO_OPTIONS, *LAYOUT_OPTIONS)
        text_kwargs = {name: flat.pop(name) for name in TEXT_OPTIONS if name in flat}
        videos_kwargs = {name: flat.pop(name) for name in named if name in flat}
        own = {"text_kwargs": text_kwargs, "images_kwargs": flat, "videos_kwargs": videos_kwargs}
        for kind, given in own.items():
            doubled = sorted(given.keys() & nested[kind].keys())
            if doubled:
                raise ValueError(f"The options {doubled} are given twice, by name and in {kind}. Give them once.")
        common = nested["common_kwargs"]
        init_kwargs = self.tokenizer.init_kwargs
        defaults = {name: init_kwargs[name] for name in TOKENIZER_DEFAULTS if init_kwargs.get(name) is not None}
        text_kwargs = {
            **defaults,
            **{name: common[name] for name in common if name in TEXT_OPTIONS},
            **text_kwargs,
            **nested["text_kwargs"],
        }
        unknown = [name for name in text_kwargs if name not in TEXT_OPTIONS]
        if unknown:
            raise TypeError(f"Unknown text options {unknown}; known are {', '.join(TEXT_OPTIONS)}.")
        # Of the options of images, those hold for videos that do not say how an image is cut.
        shared = {name: flat[name] for name in OPTIONS_FOR_BOTH if name in flat}
        common_of_images = {name: common[name] for name in common if name not in (*TEXT_OPTIONS, *named)}
        common_of_videos = {name: common[name] for name in common if name in (*named, *OPTIONS_FOR_BOTH)}
        nested["videos_kwargs"].pop("return_tensors", None)
        return (
            {**common_of_images, **flat, **nested["images_kwargs"]},
            text_kwargs,
            {**common_of_videos, **shared, **videos_kwargs, **nested["videos_kwargs"]},
        )

    def _encode_texts(
        self,
        texts: Sequence[str],
        runs: list[PromptRuns],
        add_bos: bool,
        marker: str | None,
        return_starts: bool,
    ) -> list[PromptIds]:
        bos = self._bos_ids() if add_bos else []
        prompts = []
        for text, text_runs in zip(texts, runs, strict=True):
            ids, starts, types = encode_prompt(
                self.tokenizer, text, text_runs, self.image_token_id, marker, return_starts
            )
            prefix = bos if ids[: len(bos)] != bos else []
            types = self._with_tags(prefix + ids, [0] * len(prefix) + types)
            prompts.append(PromptIds(prefix + ids, None if starts is None else [0] * len(prefix) + starts, types))
        return prompts

    def _with_tags(self, ids: list[int], types: list[int]) -> list[int]:
        """Return the types of a prompt, with those of `<img>` and `</img>` as of the visual tokens between them."""
        start, end = self.tokenizer.convert_tokens_to_ids([IMAGE_START_TOKEN, IMAGE_END_TOKEN])
        tagged = list(types)
        for place, token in enumerate(ids):
            if token == start and place + 1 < len(ids):
                tagged[place] = types[place + 1]
            elif token == end and place:
                tagged[place] = types[place - 1]
        return tagged

    def _bos_ids(self) -> list[int]:
        """Return what the tokenizer puts before a plain text: the bos token, or nothing."""
        ids = private_backend(self.tokenizer).encode("").ids
        return [token for token in ids if token == self.tokenizer.bos_token_id][:1]

    def _pad(
        self,
        prompts: list[PromptIds],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_mm_token_type_ids: bool = False,
    ) -> tuple[dict[str, Any], list[list[int]]]:
        for name, value in {"max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}.items():
            largest = math.inf if name == "max_length" and padding != "max_length" else MAX_PADDING
            if value is not None and not 1 <= operator.index(value) <= largest:
                raise ValueError(f"{name} must be in 1..{largest}, got {value}.")
        padding_side = padding_side or self.tokenizer.padding_side
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}.")
        is_limited = truncation and truncation != TruncationStrategy.DO_NOT_TRUNCATE
        limit = (max_length or self.tokenizer.model_max_length) if is_limited else None
        kept = [_kept_tokens(len(prompt.input_ids), limit, self.tokenizer.truncation_side) for prompt in prompts]
        for (ids, _, types), part in zip(prompts, kept, strict=True):
            cut = types[: part.start] + types[part.stop :]
            if any(cut):
                kind = "an image" if TOKEN_TYPES[IMAGE_TOKEN] in cut else "a video"
                raise ValueError(
                    f"Truncation to {limit} tokens would cut {kind} out of a prompt of {len(ids)} tokens. Use fewer "
                    "images, a smaller max_num_tiles or num_frames, or a larger max_length."
                )
        encoded = pad_without_fast_tokenizer_warning(
            self.tokenizer,
            {"input_ids": [prompt.input_ids[part] for prompt, part in zip(prompts, kept, strict=True)]},
            padding=padding,
            max_length=max_length,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
        )
        data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        lengths = [len(padded) for padded in data["input_ids"]]
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = [
                _padded(prompt.types[part], length, 0, padding_side)
                for prompt, part, length in zip(prompts, kept, lengths, strict=True)
            ]
        starts = [
            _padded((prompt.starts or [])[part], length, -1, padding_side)  # padding has no place in the text
            for prompt, part, length in zip(prompts, kept, lengths, strict=True)
        ]
        return data, starts

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render one conversation or a batch, and with `tokenize=True` encode it with its images and videos.

        With `tokenize=True` control tokens inside the texts are plain text and cannot forge turns or images. With
        `tokenize=False` they are not protected, and the caller has to check them.

        Args:
            conversation: messages with `role` and `content`; content is a string or a list of text, image and video
                parts (see `split_content`).
            chat_template: a template, or the name of one; defaults to the processor's.
            tools, documents: passed to the template.
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: leave the last message open.
            return_assistant_tokens_mask: also return `assistant_masks`, 1 for the tokens of assistant messages; needs
                `return_dict=True` and a template with `{% generation %}`, as the shipped one has.
            tokenize: return ids instead of text.
            return_tensors: "pt" or "np" tensors.
            return_dict: return everything the model takes; otherwise only `input_ids`.
            processor_kwargs: options of `__call__` (`padding`, `max_num_tiles`, ...).
            kwargs: options of `__call__` by name, all others are variables of the template.

        Returns:
            the rendered text, or `input_ids`, or a `BatchFeature`; lists of them for a batch.

        Raises:
            ValueError: for an unknown content part, when placeholders and images or videos differ in number, or when
                the template refuses the conversation.
            TypeError: for messages of another form.
        """
        if not isinstance(conversation, (list, tuple)):
            raise TypeError(f"A conversation is a list of messages, got {conversation!r:.80}.")
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = list(conversation) if batched else [conversation]
        if continue_final_message and not all(conversations):
            raise ValueError("continue_final_message=True needs a final message, but a conversation is empty.")
        template = self._resolve_template(chat_template)
        options, variables = self._split_template_options(kwargs, template)
        options = options | (processor_kwargs or {})
        tools = _tool_schemas(tools)
        guard = ControlTokenGuard(self.tokenizer, [conversations, tools, documents, variables]) if tokenize else None
        keep_parts = READS_PARTS.search(template) is not None and not self.prompt_format.images_first
        flattened = [
            _flatten_conversation(messages, guard, self.prompt_format, keep_parts) for messages in conversations
        ]
        if guard:
            tools, documents, variables = (guard.protect(data) for data in (tools, documents, variables))
        prompts, assistant_spans = render_messages(
            render_jinja_template,
            conversations=[messages for messages, _ in flattened],
            tools=tools,
            documents=documents,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{"image_token": self.image_token, **self.tokenizer.special_tokens_map, **variables},
        )
        if guard is None:
            return prompts if batched else prompts[0]
        media = {
            name: _choose_media(name, options.pop(f"{name}s", None), [own[name] for own in map(_by_kind, flattened)])
            for name in ("image", "video")
        }
        if return_tensors is not None:
            options = {"return_tensors": return_tensors, **options}
        options["add_special_tokens"] = False
        data, return_tensors, starts = self._encode(
            media["image"], media["video"], prompts, options, guard.marker, return_assistant_tokens_mask
        )
        if return_assistant_tokens_mask:
            data["assistant_masks"] = [
                [int(any(begin <= start < end for begin, end in spans)) for start in text_starts]
                for text_starts, spans in zip(starts, assistant_spans, strict=True)
            ]
        out = _as_batch(data, return_tensors)
        return out if return_dict else out["input_ids"]

    def _split_template_options(self, kwargs: dict[str, Any], template: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split further arguments of `apply_chat_template` into options of `__call__` and variables of the template.

        Raises:
            TypeError: for a name that is neither. A variable is a name that the template contains.
        """
        options = {name: value for name, value in kwargs.items() if name in CALL_OPTIONS}
        variables = {
            name: value for name, value in kwargs.items() if name not in (*CALL_OPTIONS, *IGNORED_TEMPLATE_OPTIONS)
        }
        unknown = [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)]
        if unknown:
            raise TypeError(f"{unknown} are neither options of the processor nor variables of the chat template.")
        if variables.get("image_token") == self.image_token:
            del variables["image_token"]  # every template gets it, and it is not text of a user
        return options, variables

    def _resolve_template(self, chat_template: str | None) -> str:
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = named.get(chat_template or "default", chat_template)
        if template is None:
            raise ValueError(
                "Neither the processor nor its tokenizer has a chat template. Load a directory with a "
                "chat_template.jinja, or pass chat_template=..."
            )
        return template

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """Write image number `image_idx` of the image processor's output as prompt text."""
        run = image_run(int(image_inputs["num_patches"][image_idx]), self.tokens_per_tile, self.image_tag_type)
        return render_run(run)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **options: Any) -> str:
        """Write video number `video_idx` of the video processor's output as prompt text.

        Times are written if the output has `video_metadata`.
        """
        layout = _layout(self.prompt_format, {name: options.get(name) for name in LAYOUT_OPTIONS})
        num_frames = int(video_inputs["num_video_frames"][video_idx])
        infos = video_inputs.get("video_metadata")
        info = VideoInfo(num_frames, None, list(range(num_frames))) if infos is None else infos[video_idx]
        return render_run(self._video_run(info, layout))

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Iterable[tuple[int, int]] | None = None,
        video_sizes: Iterable[tuple[int, int, int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Count tiles and prompt tokens of images and videos, with `<img>` and `</img>`, but without labels of frames.

        Args:
            image_sizes: (height, width) of each image in pixels.
            video_sizes: (frames, height, width) of each video; the frames are those taken.
            kwargs: options of `__call__`.
        """
        images_kwargs, _, videos_kwargs = self._split_options(kwargs)
        counts = MultiModalData()
        if image_sizes is not None:
            tiles = [
                self.image_processor.get_number_of_image_patches(height, width, images_kwargs)
                for height, width in image_sizes
            ]
            num_tags = 2 if self.image_tag_type == "internvl" else 0  # the tags of nvlm are text
            counts.num_image_tokens = [num_tags + self.tokens_per_tile * num_tiles for num_tiles in tiles]
            counts.num_image_patches = tiles
        if video_sizes is not None:
            layout = _layout(self.prompt_format, {name: videos_kwargs.get(name) for name in LAYOUT_OPTIONS})
            counts.num_video_tokens = [
                frames * self.tokens_per_tile + 2 * (1 if layout.one_run else frames) for frames, *_ in video_sizes
            ]
        return counts

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save image processor, tokenizer and template so that transformers 4.57 and 5 read them alike."""
        files = super().save_pretrained(save_directory, push_to_hub=False, **kwargs)
        # transformers 5 writes the image processor into processor_config.json, where 4.57 and servers do not find it.
        self.image_processor.save_pretrained(save_directory)
        image_config = Path(save_directory) / "preprocessor_config.json"
        config = json.loads(image_config.read_text(encoding="utf-8"))
        config["auto_map"]["AutoVideoProcessor"] = "video_processing.NemotronVLVideoProcessor"
        image_config.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tokenizer_config = Path(save_directory) / "tokenizer_config.json"
        config = with_keys_of_all_versions(json.loads(tokenizer_config.read_text(encoding="utf-8")))
        tokenizer_config.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for part in (self, self.image_processor):
            vars(part).pop("auto_map", None)  # transformers set it only to write the files
        if push_to_hub:
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **kwargs)
        return files


class NemotronVLV2Processor(NemotronVLProcessor):
    """The processor of the 12B V2: images come first in a message, and the chat template can request reasoning.

    `apply_chat_template(..., enable_thinking=True)` requests it. Without this argument the last `/think` or `/no_think`
    in a system or user text decides, and without either the model does not reason.
    """

    prompt_format = V2_FORMAT

    @staticmethod
    def split_reasoning(text: str, thinking: bool = False) -> tuple[str, str]:
        """Split what the model wrote into `(reasoning, answer)`; see the function of this name."""
        return split_reasoning(text, thinking)


def _kept_tokens(length: int, limit: int | None, side: str) -> slice:
    """Return the part of a prompt that is left after cutting it to `limit` tokens on a side, "left" or "right"."""
    if limit is None or length <= limit:
        return slice(0, length)
    return slice(length - limit, length) if side == "left" else slice(0, limit)


def with_keys_of_all_versions(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json, with the keys of transformers 4.57 beside those of 5."""
    config = dict(tokenizer_config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _as_batch(data: dict[str, Any], return_tensors: str | None) -> BatchFeature:
    """Return `data` as tensors, except the replacement offsets and the metadata, which are not numbers."""
    numbers = {
        name: value for name, value in data.items() if name not in ("text_replacement_offsets", "video_metadata")
    }
    batch = BatchFeature(numbers, tensor_type=return_tensors)
    batch.update({name: value for name, value in data.items() if name not in numbers})
    return batch


def group_images(images: Any) -> tuple[list[Any], list[int] | None]:
    """Flatten one image or document, a list, or one list per text.

    Returns:
        the images in order, and how many belong to each text (None for one image or a flat list).
    """
    if images is None:
        return [], None
    if not isinstance(images, (list, tuple)):
        return _with_pages([images]), None
    if not any(image is None or isinstance(image, (list, tuple)) for image in images):
        return _with_pages(images), None
    groups = [
        _with_pages(group if isinstance(group, (list, tuple)) else [] if group is None else [group])
        for group in images
    ]
    return [image for group in groups for image in group], [len(group) for group in groups]


def _with_pages(images: Sequence[Any]) -> list[Any]:
    """Return images with the pages of documents in their place."""
    return [page for image in images for page in (image if is_document(image) else [image])]


def _tool_schemas(tools: Any) -> Any:
    """Turn Python functions among the tools into JSON, as transformers does, so that their texts can be protected."""
    if not isinstance(tools, (list, tuple)):
        return tools
    try:
        return [
            get_json_schema(tool) if inspect.isfunction(tool) or inspect.ismethod(tool) else tool for tool in tools
        ]
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"A function among the tools cannot be described: {error}") from error


def _choose_media(kind: str, given: Any, own_of_conversations: list[list[Any]]) -> Any:
    """Return the images or videos of a batch: those in its messages, or those given separately if these hold none.

    Args:
        kind: "image" or "video".
        given: what the caller gave as `images` or `videos`, or None.
        own_of_conversations: for each conversation, what each of its parts holds, or None.
    """
    parts = [medium for own in own_of_conversations for medium in own]
    num_held = sum(medium is not None for medium in parts)
    if given is None and num_held == len(parts):
        return own_of_conversations if parts else None
    if given is None or num_held:
        raise ValueError(
            f"The messages have {len(parts)} {kind} parts, {num_held} of them with {'an' if kind == 'image' else 'a'} "
            f"{kind}, and {kind}s= was {'not ' if given is None else ''}given. Put every {kind} into its part, or all "
            f"of them into {kind}s=."
        )
    return given


def _by_kind(flattened: tuple[Any, list[Any]]) -> dict[str, list[Any]]:
    """Separate the images and the videos of a conversation."""
    _, media = flattened
    return {
        "image": [medium for medium in media if not isinstance(medium, VideoPart)],
        "video": [medium.video for medium in media if isinstance(medium, VideoPart)],
    }


def _runs_of_texts(
    texts: Sequence[str], written: PromptRuns, groups: dict[str, list[int] | None]
) -> list[dict[str, list[PromptPieces]]]:
    """Return the runs of each text.

    Args:
        texts: prompts with placeholders.
        written: all runs by their placeholders.
        groups: how many belong to each text; None if the caller did not say.

    Raises:
        ValueError: if placeholders and runs differ in number.
    """
    counted = [count_placeholders(text) for text in texts]
    for token, runs in written.items():
        counts = [own[token] for own in counted]
        if sum(counts) != len(runs) or groups[token] not in (None, counts):
            name = token.strip("<>")
            raise ValueError(
                f"The number of {token} tokens in the prompts should be the same as the number of {name}s, but the "
                f"prompts have {counts} and {groups[token] or len(runs)} {name}s were given. Write one per {name}, in "
                f"the order of the {name}s."
            )
    left = {token: iter(runs) for token, runs in written.items()}
    return [{token: [next(left[token]) for _ in range(count)] for token, count in own.items()} for own in counted]


def _layout(prompt_format: PromptFormat, options: dict[str, Any]) -> VideoLayout:
    """Return how videos are written under the `LAYOUT_OPTIONS` of a call."""
    name, header, label, timed_label, separator = (options.get(option) for option in LAYOUT_OPTIONS)
    if timed_label is None and label is not None and "{time" in label:
        raise ValueError(
            f"frame_label={label!r} has a time; give it as timed_frame_label, for videos whose times are known."
        )
    timed_label = label if timed_label is None else timed_label
    return layout_of(prompt_format, name, header=header, label=label, timed_label=timed_label, separator=separator)


def _padded(values: list[int], length: int, filler: int, side: str) -> list[int]:
    padding = [filler] * (length - len(values))
    return padding + values if side == "left" else values + padding


def _flatten_conversation(
    messages: list[dict[str, Any]], guard: ControlTokenGuard | None, prompt_format: PromptFormat, keep_parts: bool
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return the messages with their contents protected by `guard`, and their images and videos in order.

    Each content becomes a string with placeholders. With `keep_parts` a list of parts stays a list.
    """
    flattened, media = [], []
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"A conversation is a list of messages, got {messages!r:.80}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError(f"A message is a dict with a 'role' and a 'content', got {message!r:.80}.")
        others = {name: value for name, value in message.items() if name != "content" and value is not None}
        content = message.get("content")
        if keep_parts and isinstance(content, (list, tuple)):
            texts, own_media = split_content(content)
            texts = guard.protect(texts) if guard else texts
            kinds = [{"type": placeholder_of(medium).strip("<>")} for medium in own_media]
            parts = [part for text, kind in zip(texts, [*kinds, {}], strict=True) for part in (_text_part(text), kind)]
            content = [part for part in parts if part and part.get("text") != ""]
        else:
            content, own_media = flatten_content(content, guard, prompt_format)
        flattened.append({**(guard.protect(others) if guard else others), "content": content})
        media += own_media
    return flattened, media


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


NemotronVLProcessor.register_for_auto_class()
NemotronVLV2Processor.register_for_auto_class()
