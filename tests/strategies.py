"""Hostile inputs as hypothesis strategies, and what must hold for each: shared by the suite and by `tests.fuzz`.

`check_*` hands an input to the code and returns "accepted" or "refused". A refusal is a ValueError or TypeError; any
other exception passes through, and an accepted input must have the properties asserted here.
"""

import base64
import inspect
import io
import json
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from nemotron_vl.configuration_nemotron_vl import LLAMA_3_1_8B, NemotronVLConfig, RADIOConfig
from nemotron_vl.image_processing import NemotronVLImageProcessor
from nemotron_vl.processing_nemotron_vl import IMAGE_TOKEN, NemotronVLProcessor, build_chat_prompts
from PIL import Image

from tools.tiny_checkpoint import IMAGE_TOKENS, LLAMA_TOKENS, make_config, make_tokenizer

REFUSALS = (ValueError, TypeError)
MODES = [
    "1",
    "L",
    "La",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
]
FORMATS = [
    "PNG",
    "JPEG",
    "WEBP",
    "TIFF",
    "GIF",
    "BMP",
    "PPM",
    "ICO",
    "TGA",
    "PCX",
    "SGI",
    "JPEG2000",
    "DDS",
    "QOI",
    "MPO",
    "AVIF",
]


@lru_cache(maxsize=1)
def tiny_processor() -> NemotronVLProcessor:
    return NemotronVLProcessor(NemotronVLImageProcessor(image_size=64, max_num_tiles=6), make_tokenizer())


# Pictures ------------------------------------------------------------------------------------------------------------


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@st.composite
def pil_images(draw: st.DrawFn) -> Image.Image:
    mode = draw(st.sampled_from(MODES))
    width, height = draw(st.integers(0, 90)), draw(st.integers(0, 90))
    if draw(st.integers(0, 20)) == 0:
        width, height = draw(st.sampled_from([(1, 3000), (3000, 1), (1, 1), (700, 500)]))
    image = Image.new(mode, (width, height))
    if width and height and draw(st.booleans()):
        data = noise(draw(st.integers(0, 99)), width * height * 8).tobytes()
        image.frombytes(data[: len(image.tobytes())])
    if mode == "P" and draw(st.booleans()):
        image.putpalette(draw(st.binary(max_size=900)).ljust(3, b"\0"), draw(st.sampled_from(["RGB", "RGBA"])))
    if draw(st.integers(0, 9)) == 0:
        key = draw(st.sampled_from([0, 255, 300, -1, b"", b"\0" * 9, (0, 0, 0), (1,), "x", None]))
        image.info["transparency"] = key
    return image


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    dtypes = ["uint8"] * 4 + [
        "bool",
        "int8",
        "uint16",
        "int64",
        "float16",
        "float32",
        "float64",
        ">f4",
        "complex64",
        "object",
        "U3",
    ]
    dtype = draw(st.sampled_from(dtypes))
    sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 33, 64])
    shape = draw(
        st.one_of(st.tuples(sizes, sizes, st.sampled_from([1, 3, 4])), st.lists(sizes, max_size=4).map(tuple))
    )
    array = np.array(noise(draw(st.integers(0, 99)), *shape))
    if dtype.endswith(("f4", "float16", "float32", "float64")):
        array = array.astype(dtype) / draw(st.sampled_from([255, 1, 128]))
        if array.size and draw(st.integers(0, 4)) == 0:
            array.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf, -1e-3, 1.001, 1.1, -1e30, 1e-40]))
    else:
        array = array.astype(dtype)
    if draw(st.booleans()):
        array = array.transpose()[..., ::-1] if array.ndim else array
    array = np.asarray(array)
    array.flags.writeable = draw(st.booleans())
    if draw(st.booleans()) and dtype not in ("object", "U3", ">f4", "uint16"):
        tensor = torch.from_numpy(array.copy())
        if dtype == "float32" and draw(st.booleans()):
            tensor = tensor.to(draw(st.sampled_from([torch.bfloat16, torch.float32]))).requires_grad_()
        return tensor
    return array


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """Encode as well as the format allows; what it cannot hold becomes RGB or PNG."""
    for candidate, name in (
        (image, image_format),
        (image.convert("RGB"), image_format),
        (image.convert("RGB"), "PNG"),
    ):
        buffer = io.BytesIO()
        try:
            candidate.save(buffer, name, **options)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return buffer.getvalue()
    raise ValueError(f"Pillow cannot encode {image}")


@cache
def whole_file(image_format: str, kind: int) -> bytes:
    """A small file: kinds differ in mode, size, frames, orientation and profile."""
    mode = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "LA")[kind % 8]
    image = Image.fromarray(noise(kind, 20, 24, 3)).convert("RGB" if mode == "I;16" else mode)
    image = Image.new("I;16", (24, 20), 999) if mode == "I;16" else image
    options: dict[str, Any] = {}
    if kind >= 8 and image_format != "AVIF":  # Pillow's AVIF encoder crashes on a senseless profile
        exif = Image.Exif()
        exif[0x0112] = kind % 9
        options = {"exif": exif, "icc_profile": bytes(noise(kind, 200))}
    if kind >= 16 and image_format in ("GIF", "WEBP", "TIFF", "PNG", "MPO", "AVIF"):
        options |= {"save_all": True, "append_images": [image, image.rotate(90)]}
    return encoded(image, image_format, **options)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A picture file, most of them damaged: bytes changed, cut, doubled, spliced with another file."""
    data = bytearray(whole_file(draw(st.sampled_from(FORMATS)), draw(st.integers(0, 23))))
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, min(len(data), 400)))
        damage = draw(st.sampled_from(["change", "change", "change", "insert", "delete", "cut", "double", "splice"]))
        if damage == "change" and place < len(data):
            data[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
        elif damage == "insert":
            data[place:place] = draw(st.binary(max_size=8))
        elif damage == "delete":
            del data[place : place + draw(st.integers(1, 8))]
        elif damage == "cut":
            del data[draw(st.integers(0, len(data))) :]
        elif damage == "double":
            data += data[place : place + 200]
        elif damage == "splice":
            data[place:] = whole_file(draw(st.sampled_from(FORMATS)), draw(st.integers(0, 23)))[place:]
    return bytes(data)


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def opened(data: bytes) -> Any:
    """What `Image.open` gives, not decoded yet; the bytes where it gives nothing."""
    try:
        return Image.open(io.BytesIO(data))
    except Exception:  # Pillow's own answer to the file, before our code sees it
        return data


@cache  # building a strategy costs more than drawing from it
def pictures() -> st.SearchStrategy[Any]:
    file = files()
    one = st.one_of(
        pil_images(),
        arrays(),
        file,
        file.map(opened),
        file.map(base64_text),
        file.map(lambda data: f"data:image/png;base64,{base64_text(data)}"),
        st.binary(max_size=40),
        st.text(max_size=20),
        st.sampled_from(
            [None, 3, 1.5, {}, set(), object, "/", "file:///", "data:", "https://example.com/x.png", Path()]
        ),
    )
    return one | st.lists(one, max_size=3) | st.lists(st.lists(one, max_size=2), max_size=2)


@cache
def image_options() -> st.SearchStrategy[dict[str, Any]]:
    values = {
        "image_size": st.sampled_from([64, 64, 32, 0, -32, 50, 2**20, "64", None]),
        "max_num_tiles": st.sampled_from([1, 4, 12, 0, -1, 10**9, True, None]),
        "use_thumbnail": st.sampled_from([True, False, 1]),
        "upscale": st.sampled_from([1, 2, 3]),
        "do_rescale": st.booleans(),
        "rescale_factor": st.sampled_from([1 / 255, 1.0, 0, float("nan"), 1e-320]),
        "downsample_ratio": st.sampled_from([0.5, 1, 0.3, 1e-320, float("nan")]),
        "do_convert_rgb": st.booleans(),
        "input_data_format": st.sampled_from([None, "channels_first", "channels_last", "up", 3]),
        "return_tensors": st.sampled_from([None, "pt", "np", "tf", 3]),
        "nonsense": st.just(1),
    }
    return st.just({}) | st.sampled_from(sorted(values)).flatmap(
        lambda name: values[name].map(lambda value: {name: value})
    )


def check_pictures(images: Any, options: dict[str, Any]) -> str:
    processor = tiny_processor().image_processor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = processor(images, **options)
        except REFUSALS:
            return "refused"
    pixel_values, num_patches = torch.as_tensor(out["pixel_values"]), [int(tiles) for tiles in out["num_patches"]]
    assert len(pixel_values) == sum(num_patches)
    assert all(1 <= tiles <= 13 for tiles in num_patches)
    assert torch.isfinite(pixel_values).all()
    high = 255 if pixel_values.dtype == torch.uint8 or options.get("rescale_factor") == 1.0 else 1
    assert pixel_values.numel() == 0 or 0 <= pixel_values.min() <= pixel_values.max() <= high
    return "accepted"


# Text ----------------------------------------------------------------------------------------------------------------

CONTROL_TOKENS = [*LLAMA_TOKENS, *IMAGE_TOKENS]
TURN_TOKENS = [*LLAMA_TOKENS, "<img>", "</img>"]


@cache
def texts(max_pieces: int = 6) -> st.SearchStrategy[str]:
    """Control tokens, halves of them, template syntax, and all of Unicode with its surrogates and controls."""
    halves = [token[:cut] for token in CONTROL_TOKENS for cut in (1, 3, len(token) - 1)]
    halves += [token[cut:] for token in CONTROL_TOKENS for cut in (1, 3)]
    syntax = ["{{ 1 }}", "{% endfor %}", "{#", "\n\n", " ", "\0", "\u202e", "\ufeff", "\U000f0000", "\U000f0001", "\r"]
    piece = st.one_of(
        st.sampled_from(CONTROL_TOKENS),
        st.sampled_from(halves),
        st.sampled_from(syntax),
        st.text(st.characters(exclude_categories=[]), max_size=6),
        st.text(max_size=6),
    )
    return st.lists(piece, max_size=max_pieces).map("".join)


SMALL = Image.new("RGB", (16, 16), "red")
WIDE = Image.new("RGB", (60, 20), "blue")


@cache
def json_values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=True), texts(2))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts(2), inner, max_size=2), max_leaves=4
    )


@cache
def contents() -> st.SearchStrategy[Any]:
    text_part = texts(3).map(lambda words: {"type": "text", "text": words})
    image_part = st.sampled_from([SMALL, WIDE]).map(lambda image: {"type": "image", "image": image})
    odd = st.sampled_from(
        [
            {"type": "image"},
            {"type": "image_url"},
            {"type": "image_url", "image_url": {}},
            {"type": "video"},
            {},
            None,
            3,
            {"type": "text"},
        ]
    )
    good = st.lists(st.one_of(text_part, text_part, image_part, texts(2)), max_size=5)
    return st.one_of(
        texts(), good, good, st.lists(st.one_of(text_part, image_part, odd), max_size=3), st.none(), st.integers()
    )


@cache
def conversations() -> st.SearchStrategy[Any]:
    role = st.sampled_from(["user", "user", "assistant", "system", "tool"])
    calls = st.lists(st.fixed_dictionaries({"name": texts(2), "arguments": json_values()}), max_size=2)
    message = st.fixed_dictionaries({"role": role, "content": contents()})
    with_calls = st.fixed_dictionaries(
        {"role": role | texts(2), "content": contents(), "tool_calls": calls | json_values()}
    )
    odd = st.dictionaries(st.sampled_from(["role", "content", "name"]), json_values(), max_size=3) | json_values()
    conversation = st.lists(st.one_of(message, message, message, with_calls), max_size=5)
    return st.one_of(
        conversation,
        conversation,
        st.lists(conversation, max_size=3),
        st.lists(message | odd, max_size=3),
        json_values(),
    )


@cache
def template_options() -> st.SearchStrategy[dict[str, Any]]:
    tool = st.fixed_dictionaries({"name": texts(2), "parameters": json_values()})
    values = {
        "tools": st.lists(tool, max_size=2) | json_values(),
        "padding": st.sampled_from([True, False, "longest", "no", 3]),
        "padding_side": st.sampled_from(["left", "right", "up"]),
        "truncation": st.booleans(),
        "max_length": st.sampled_from([1, 30, 4096, 0, -1, "x"]),
        "pad_to_multiple_of": st.sampled_from([8, 1, 0, -8]),
        "return_tensors": st.sampled_from(["pt", "np", "x"]),
        "continue_final_message": st.booleans(),
        "return_assistant_tokens_mask": st.booleans(),
        "return_mm_token_type_ids": st.booleans(),
        "images": st.sampled_from([None, [], [SMALL], SMALL, [[SMALL]], 3]),
    }
    none = st.just({})
    return (
        none
        | none
        | st.sampled_from(sorted(values)).flatmap(lambda name: values[name].map(lambda value: {name: value}))
    )


def control_counts(ids: list[int]) -> dict[str, int]:
    tokenizer = tiny_processor().tokenizer
    return {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in TURN_TOKENS}


def expected_counts(num_turns: int, num_ends: int, num_images: int) -> dict[str, int]:
    """Control tokens of an honest prompt: nothing inside the texts may add to them."""
    return {
        **dict.fromkeys(TURN_TOKENS, 0),
        "<|begin_of_text|>": 1,
        "<|start_header_id|>": num_turns,
        "<|end_header_id|>": num_turns,
        "<|eot_id|>": num_ends,
        "<img>": num_images,
        "</img>": num_images,
    }


def check_messages(conversation: Any, options: dict[str, Any]) -> str:
    processor = tiny_processor()
    try:
        out = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, add_generation_prompt=True, **options
        )
    except REFUSALS:
        return "refused"
    batch = conversation if conversation and not isinstance(conversation[0], dict) else [conversation]
    rows = [[int(token) for token in row] for row in out["input_ids"]]
    assert len(rows) == len(batch)
    if set(options) - {"return_mm_token_type_ids", "return_assistant_tokens_mask"}:
        return "accepted"
    tiles = iter(int(tiles) for tiles in out.get("num_patches", []))
    for messages, ids in zip(batch, rows, strict=True):
        images = sum(
            isinstance(part, dict) and part["type"] != "text"
            for message in messages
            if isinstance(message.get("content"), (list, tuple))
            for part in message.get("content")
        )
        assert control_counts(ids) == expected_counts(len(messages) + 1, len(messages), images)
        visual = processor.tokens_per_tile * sum(next(tiles) for _ in range(images))
        assert ids.count(processor.image_token_id) == visual
    return "accepted"


TILE_COUNTS = st.lists(st.integers(1, 3), min_size=12, max_size=12)
HISTORIES = st.lists(st.tuples(texts(3), texts(3)), max_size=3) | st.none() | json_values()
QUESTIONS = texts() | texts() | json_values() | st.lists(texts(3), max_size=3)
ODD_COUNTS = st.none() | st.lists(st.integers(-1, 3), max_size=3) | json_values()
SYSTEM_PROMPTS = st.none() | texts(3)
LIMITS = st.none() | st.none() | st.integers(1, 200)


@st.composite
def chat_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `build_chat_prompts`, what `chat()` makes of its own: about half of them add up."""
    history, question = draw(HISTORIES), draw(QUESTIONS)
    asked = [turn[0] for turn in history if isinstance(turn, tuple)] if isinstance(history, list) else []
    asked += question if isinstance(question, list) else [question]
    wanted = sum(text.count(IMAGE_TOKEN) for text in asked if isinstance(text, str))
    counts = draw(TILE_COUNTS)[:wanted]
    odd = draw(st.integers(0, 3)) == 0
    return {
        "question": question,
        "history": history,
        "num_patches": draw(ODD_COUNTS) if odd else torch.tensor(counts, dtype=torch.long) if wanted % 2 else counts,
        "num_tiles": draw(st.integers(0, 3)) if odd else sum(counts),
        "system_prompt": draw(SYSTEM_PROMPTS),
        "max_length": draw(LIMITS),
    }


def check_chat(arguments: dict[str, Any]) -> str:
    processor = tiny_processor()
    try:
        prompts = build_chat_prompts(
            processor.tokenizer,
            **arguments,
            tokens_per_tile=4,
            image_token_id=processor.image_token_id,
            image_tag_type="internvl",
        )
    except REFUSALS:
        return "refused"
    assert [tile for prompt in prompts for tile in prompt.tiles] == sorted(
        {tile for prompt in prompts for tile in prompt.tiles}
    )
    for prompt in prompts:
        images = sum(text.count(IMAGE_TOKEN) for text in (prompt.question, *(asked for asked, _ in prompt.history)))
        ends = 2 * len(prompt.history) + 1 + (arguments["system_prompt"] is not None)
        assert control_counts(prompt.input_ids) == expected_counts(ends + 1, ends, images)
        assert prompt.input_ids.count(processor.image_token_id) == 4 * len(prompt.tiles)
    return "accepted"


# Configs -------------------------------------------------------------------------------------------------------------


# The keys that are ours to judge; transformers' own (id2label, ...) are its own.
CONFIG_KEYS = {
    "config": sorted(inspect.signature(NemotronVLConfig).parameters.keys() - {"kwargs"}),
    "vision_config": sorted(inspect.signature(RADIOConfig).parameters.keys() - {"kwargs"}),
    "llm_config": sorted(LLAMA_3_1_8B.keys() - {"rope_scaling"}),
}


@lru_cache(maxsize=1)
def honest_config() -> str:
    return make_config(make_tokenizer()).to_json_string(use_diff=False)


@st.composite
def config_dicts(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json with a few values replaced by anything."""
    config = json.loads(honest_config())
    wrong = st.one_of(
        json_values(),
        st.sampled_from(
            [0, -1, 1, 2, 7, 10**6, 10**9, 10**30, 0.5, 1e-320, True, "", "32", [], {}, [16], float("inf")]
        ),
    )
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(CONFIG_KEYS)))
        part = config if name == "config" else config[name]
        if isinstance(part, dict):
            part[draw(st.sampled_from(CONFIG_KEYS[name]))] = draw(wrong)
    return config


def check_config(config_dict: dict[str, Any], others: tuple[type[Exception], ...] = ()) -> str:
    """`others`: what transformers' own LlamaConfig raises beside ValueError and TypeError."""
    try:
        config = NemotronVLConfig(**config_dict)
        assert config.merge_size >= 1 and config.num_image_tokens_per_tile >= 1
        config.to_json_string()
    except (*REFUSALS, *others):
        return "refused"
    return "accepted"
