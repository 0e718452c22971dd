"""The `AutoProcessor` of Nemotron Nano VL: from messages and images to prompt ids and tiles.

The chat template renders a prompt, `prompts.py` expands its `<image>` placeholders to the tiles of their images, and
`image_processing.py` cuts the images into tiles. This file handles options, padding and templates.
"""

import inspect
import json
import math
import operator
import os
import re
import sys
from collections.abc import Iterable, Sequence
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
    V1_FORMAT,
    V2_FORMAT,
    ControlTokenGuard,
    PromptFormat,
    PromptIds,
    PromptPieces,
    encode_prompt,
    flatten_content,
    image_run,
    image_token_id_of,
    private_backend,
    render_messages,
    render_run,
    replacement_offsets,
    split_content,
    split_reasoning,
)

# A template that matches this reads the parts of a content itself. Others, like the published one, need a string.
READS_PARTS = re.compile(r"""\[\s*["'](type|text)["']\s*\]|\.(type|text)\b""")
FIT = "fit"  # max_num_tiles: the largest number with which all images of a prompt fit the context
ANSWER_TOKENS = 1024  # that is left for the answer, as much as chat() lets an answer take
LONGEST_CONTEXT = 1 << 40  # tokens; a tokenizer that states no length has a larger one
PLAN_OPTIONS = ("context_length", "answer_tokens")
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
# Videos and audio are refused, so their options, which some clients always send, are accepted and ignored.
OTHER_MODALITIES = ("videos", "audio", "audios")
IGNORED_MEDIA_OPTIONS = (
    "num_frames",
    "fps",
    "do_sample_frames",
    "video_metadata",
    "return_metadata",
    "sampling_rate",
    "videos_kwargs",
    "audio_kwargs",
)
NESTED_OPTIONS = ("images_kwargs", "text_kwargs", "common_kwargs")
CALL_OPTIONS = (*TEXT_OPTIONS, *IMAGE_OPTIONS, "images", *NESTED_OPTIONS, *OTHER_MODALITIES, *IGNORED_MEDIA_OPTIONS)
# Options that a tokenizer may have been loaded with: from_pretrained(..., padding="max_length", max_length=512).
TOKENIZER_DEFAULTS = ("padding", "truncation", "max_length", "pad_to_multiple_of")
# Options of transformers' own `apply_chat_template`: the first is always on here, the second concerns videos.
IGNORED_TEMPLATE_OPTIONS = ("sanitize_control_tokens", "load_audio_from_video")


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
    def image_token_ids(self) -> list[int]:
        """Ids that belong to an image: the visual token, its start and its end."""
        return [self.image_token_id, *self.tokenizer.convert_tokens_to_ids([IMAGE_START_TOKEN, IMAGE_END_TOKEN])]

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenise rendered prompts and cut their images into tiles.

        `text` is trusted: it is a prompt that the chat template has rendered, in which control tokens are control
        tokens. For text of users, call `apply_chat_template(..., tokenize=True)`.

        Args:
            images: one image, a flat list over the whole batch in the order of the placeholders, or one list per
                text; anything the image processor takes.
            text: one prompt or a batch, each with one `<image>` per image.
            kwargs: options of the image processor (`max_num_tiles`, which may also be "fit": the largest number with
                which the images of every prompt fit the context), of the tokenizer (`padding`, `max_length`, ...),
                `answer_tokens` (what "fit" and the pages of documents leave for the answer, 1,024) and
                `context_length` (by default the tokenizer's `model_max_length`), `return_tensors`, `return_mm_token_type_ids`, `return_text_replacement_offsets`;
                also nested as `images_kwargs`, `text_kwargs` and `common_kwargs`. `videos`, `audio` and `audios` must
                be empty: the 8B V1 has no prompt format for them.

        Returns:
            `input_ids` and `attention_mask`, and with images `pixel_values` and `num_patches`. Padding is on the left,
            and a bos token is added if the prompt has none. On request also `mm_token_type_ids` (1 for visual tokens
            and the `<img>` and `</img>` around them) and `text_replacement_offsets` (see `replacement_offsets`). A
            client that cannot pass `num_patches` on sets `image_processor.model_input_names = ["pixel_values"]`; the
            model does not need it.

        Raises:
            ValueError: if placeholders and images differ in number, if the pages of documents do not fit the context
                (the message names the largest `max_num_tiles` that fits), for videos or audio, if a truncation would cut an
                image, or for an option that is given twice.
            TypeError: for an unknown option.
        """
        if images is None and text is None:
            raise ValueError("Give the processor images, text or both; it got neither.")
        texts = [text] if isinstance(text, str) else text
        if texts is not None and not (
            isinstance(texts, (list, tuple)) and texts and all(isinstance(one, str) for one in texts)
        ):
            raise TypeError(f"text must be a string or a non-empty list of strings, got {text!r:.80}.")
        data, return_tensors, _ = self._encode(images, texts, kwargs)
        return _as_batch(data, return_tensors)

    def _encode(
        self,
        images: Any,
        texts: Sequence[str] | None,
        options: dict[str, Any],
        marker: str | None = None,
        return_starts: bool = False,
    ) -> tuple[dict[str, Any], str | None, list[list[int]]]:
        """Do what `__call__` does, and also return `return_tensors` and the place in its text where each id starts."""
        images_kwargs, text_kwargs = self._split_options(options)
        return_tensors = text_kwargs.pop("return_tensors", None)
        data: dict[str, Any] = {}
        starts: list[list[int]] = []
        flat_images, images_per_text = group_images(images)
        plan_kwargs = {name: text_kwargs.pop(name) for name in PLAN_OPTIONS if name in text_kwargs}
        has_pages = texts is not None and any(map(is_page, flat_images))
        if has_pages or images_kwargs.get("max_num_tiles") == FIT:
            flat_images, images_kwargs = self._fit_context(
                flat_images, texts, images_per_text, images_kwargs, marker, **plan_kwargs
            )
        features = self.image_processor(flat_images, **images_kwargs)  # refuses unknown options without images, too
        if flat_images:
            data.update({name: features[name] for name in self.image_processor.model_input_names})
        if texts is not None:
            add_bos = text_kwargs.pop("add_special_tokens", True)
            wants_offsets = text_kwargs.pop("return_text_replacement_offsets", False)
            runs = self._image_runs(texts, list(features["num_patches"]), images_per_text)
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
        return len(encode_prompt(self.tokenizer, IMAGE_TOKEN, [run], self.image_token_id).input_ids)

    def _fit_context(
        self,
        images: list[Any],
        texts: Sequence[str] | None,
        images_per_text: list[int] | None,
        images_kwargs: dict[str, Any],
        marker: str | None,
        context_length: int | None = None,
        answer_tokens: int | None = None,
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the images, read, and their options with a number of tiles with which every text fits the context.

        Raises:
            ValueError: if the wished number does not fit, before any page is drawn.
        """
        images_kwargs = dict(images_kwargs)
        max_num_tiles = images_kwargs.pop("max_num_tiles", None)
        if texts is None:
            raise ValueError(f"max_num_tiles={FIT!r} needs the prompts that the images have to fit with, as text=.")
        context_length = self.tokenizer.model_max_length if context_length is None else context_length
        if max_num_tiles == FIT and context_length > LONGEST_CONTEXT:
            raise ValueError(
                f"max_num_tiles={FIT!r} needs the length of the context, which the tokenizer does not state: pass "
                "context_length=model.config.max_sequence_length."
            )
        options = self.image_processor.with_options(images_kwargs)
        loaded = options.load_images(images, images_kwargs.get("input_data_format"))
        runs = self._image_runs(texts, [1] * len(loaded), images_per_text)
        prompts = self._encode_texts(texts, runs, True, marker, False)
        remaining, fitting = iter(loaded), []
        for (ids, _), own in zip(prompts, runs, strict=True):
            text_tokens = len(ids) - len(own) * self.tokens_of_image(1)
            room = context_length - text_tokens - (ANSWER_TOKENS if answer_tokens is None else answer_tokens)
            if own:
                own_images = [next(remaining) for _ in own]
                fitting.append(self.fitting_options(own_images, max_num_tiles, room, **images_kwargs))
        return loaded, {**images_kwargs, **min(fitting, key=lambda option: option["max_num_tiles"], default={})}

    def _split_options(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split the options of a call, also nested and common ones, into those for images and those for text."""
        flat = {name: value for name, value in options.items() if name not in IGNORED_MEDIA_OPTIONS}
        for name in OTHER_MODALITIES:
            given = flat.pop(name, None)
            if given is not None and len(given):
                raise ValueError(f"This model takes no {name}; send the frames of a video as images.")
        nested = {name: flat.pop(name, None) or {} for name in NESTED_OPTIONS}
        text_kwargs = {name: flat.pop(name) for name in TEXT_OPTIONS if name in flat}
        for kind, given in (("text_kwargs", text_kwargs), ("images_kwargs", flat)):
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
        common_of_images = {name: common[name] for name in common if name not in TEXT_OPTIONS}
        return {**common_of_images, **flat, **nested["images_kwargs"]}, text_kwargs

    def _image_runs(
        self, texts: Sequence[str], num_tiles: list[int], images_per_text: list[int] | None
    ) -> list[list[PromptPieces]]:
        """Return the image runs of each text."""
        counts = [text.count(IMAGE_TOKEN) for text in texts]
        if sum(counts) != len(num_tiles) or images_per_text not in (None, counts):
            raise ValueError(
                f"The number of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images, but "
                f"the prompts have {counts} and {images_per_text or len(num_tiles)} images were given. Write one per "
                "image, in the order of the images."
            )
        runs = iter([image_run(int(tiles), self.tokens_per_tile, self.image_tag_type) for tiles in num_tiles])
        return [[next(runs) for _ in range(count)] for count in counts]

    def _encode_texts(
        self,
        texts: Sequence[str],
        runs: list[list[PromptPieces]],
        add_bos: bool,
        marker: str | None,
        return_starts: bool,
    ) -> list[PromptIds]:
        bos = self._bos_ids() if add_bos else []
        prompts = []
        for text, text_runs in zip(texts, runs, strict=True):
            ids, starts = encode_prompt(self.tokenizer, text, text_runs, self.image_token_id, marker, return_starts)
            prefix = bos if ids[: len(bos)] != bos else []
            prompts.append(PromptIds(prefix + ids, None if starts is None else [0] * len(prefix) + starts))
        return prompts

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
        kept = [_kept_tokens(len(ids), limit, self.tokenizer.truncation_side) for ids, _ in prompts]
        for (ids, _), part in zip(prompts, kept, strict=True):
            if not set(self.image_token_ids).isdisjoint(ids[: part.start] + ids[part.stop :]):
                raise ValueError(
                    f"Truncation to {limit} tokens would cut an image out of a prompt of {len(ids)} tokens. Use fewer "
                    "images, a smaller max_num_tiles, or a larger max_length."
                )
        encoded = pad_without_fast_tokenizer_warning(
            self.tokenizer,
            {"input_ids": [ids[part] for (ids, _), part in zip(prompts, kept, strict=True)]},
            padding=padding,
            max_length=max_length,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
        )
        data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if return_mm_token_type_ids:
            of_images = set(self.image_token_ids)
            data["mm_token_type_ids"] = [[int(i in of_images) for i in ids] for ids in data["input_ids"]]
        starts = []
        for (_, prompt_starts), part, padded in zip(prompts, kept, data["input_ids"], strict=True):
            kept_starts = (prompt_starts or [])[part]
            padding_starts = [-1] * (len(padded) - len(kept_starts))  # padding has no place in the text
            starts.append(padding_starts + kept_starts if padding_side == "left" else kept_starts + padding_starts)
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
        """Render one conversation or a batch, and with `tokenize=True` encode it together with its images.

        With `tokenize=True` control tokens inside the texts are plain text and cannot forge turns or images. With
        `tokenize=False` they are not protected, and the caller has to check them.

        Args:
            conversation: messages with `role` and `content`; content is a string or a list of text and image parts
                (see `split_content`).
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
            ValueError: for an unknown content part, when placeholders and images differ in number, or when the
                template refuses the conversation.
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
        images = _choose_images(options.pop("images", None), [images for _, images in flattened])
        if return_tensors is not None:
            options = {"return_tensors": return_tensors, **options}
        options["add_special_tokens"] = False
        data, return_tensors, starts = self._encode(
            images, prompts, options, guard.marker, return_assistant_tokens_mask
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

    def _get_num_multimodal_tokens(
        self, image_sizes: Iterable[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Count tiles and prompt tokens of images, with `<img>` and `</img>`, from their (height, width) in pixels."""
        if image_sizes is None:
            return MultiModalData()
        tiles = [
            self.image_processor.get_number_of_image_patches(height, width, kwargs) for height, width in image_sizes
        ]
        num_tags = 2 if self.image_tag_type == "internvl" else 0  # the tags of nvlm are text
        return MultiModalData(
            num_image_tokens=[num_tags + self.tokens_per_tile * num_tiles for num_tiles in tiles],
            num_image_patches=tiles,
        )

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save image processor, tokenizer and template so that transformers 4.57 and 5 read them alike."""
        files = super().save_pretrained(save_directory, push_to_hub=False, **kwargs)
        # transformers 5 writes the image processor into processor_config.json, where 4.57 and servers do not find it.
        self.image_processor.save_pretrained(save_directory)
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
    """Return `data` as tensors, except the replacement offsets, which are not numbers."""
    numbers = {name: value for name, value in data.items() if name != "text_replacement_offsets"}
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


def _choose_images(images: Any, images_of_messages: list[list[Any]]) -> Any:
    """Return the images of a batch: those in its messages, or those given separately if the messages hold none.

    Args:
        images: what the caller gave as `images`, or None.
        images_of_messages: for each conversation, the image of each image part; None for a part that holds none.
    """
    parts = [image for own in images_of_messages for image in own]
    num_held = sum(image is not None for image in parts)
    if images is None and num_held == len(parts):
        return images_of_messages if parts else None
    if images is None or num_held:
        raise ValueError(
            f"The messages have {len(parts)} image parts, {num_held} of them with an image, and images= was "
            f"{'not ' if images is None else ''}given. Put every image into its part, or all of them into images=."
        )
    return images


def _flatten_conversation(
    messages: list[dict[str, Any]], guard: ControlTokenGuard | None, prompt_format: PromptFormat, keep_parts: bool
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return the messages with their contents protected by `guard`, and their images in order.

    Each content becomes a string with `<image>` placeholders. With `keep_parts` a list of parts stays a list.
    """
    flattened, images = [], []
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"A conversation is a list of messages, got {messages!r:.80}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError(f"A message is a dict with a 'role' and a 'content', got {message!r:.80}.")
        others = {name: value for name, value in message.items() if name != "content" and value is not None}
        content = message.get("content")
        if keep_parts and isinstance(content, (list, tuple)):
            texts, own_images = split_content(content)
            texts = guard.protect(texts) if guard else texts
            parts = [part for text in texts for part in ({"type": "text", "text": text}, {"type": "image"})][:-1]
            content = [part for part in parts if part.get("text") != ""]
        else:
            content, own_images = flatten_content(content, guard, prompt_format)
        flattened.append({**(guard.protect(others) if guard else others), "content": content})
        images += own_images
    return flattened, images


NemotronVLProcessor.register_for_auto_class()
NemotronVLV2Processor.register_for_auto_class()
