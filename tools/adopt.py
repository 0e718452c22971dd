"""Turn a downloaded Nemotron Nano VL checkpoint into a directory that loads with this repository's code.

    python -m tools.adopt SOURCE --check          # only report; also reads every weight, for NaN and infinity
    python -m tools.adopt SOURCE --out DIR        # weights are linked and take no space
    python -m tools.adopt SOURCE --out DIR --copy # a copy that was stopped goes on when the command is repeated

SOURCE stays as it is. Before anything is written, every tensor is checked by its safetensors header against the model
that the source's config.json describes; if anything is wrong, the report says what, and nothing is written. A linked
weight is the source's own file: overwriting it in place changes both.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from nemotron_vl.checkpoint import INDEX_FILE, SINGLE_FILE, TORCH_DTYPES, CheckpointError, read_json
from nemotron_vl.configuration_nemotron_vl import IMAGE_TOKEN, NemotronVLConfig, NemotronVLV2Config
from nemotron_vl.image_processing import NemotronVLImageProcessor, recipe_of
from nemotron_vl.processing_nemotron_vl import with_keys_of_all_versions
from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.chat_template_utils import render_jinja_template

from . import ROOT
from .command_line import command_parser, progress, require_directory
from .weights import (
    CONFIG_ERRORS,
    MODELS,
    WeightReport,
    check_values,
    check_weights,
    main_dtype,
    make_index,
)

# Asked of the tokenizer, with ours in its place where the vocabulary has it.
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token")
# Where our files for a member of the family lie.
FOLDERS = {NemotronVLConfig.model_type: ROOT, NemotronVLV2Config.model_type: ROOT / "v2"}
# A tokenizer without a context length says 10^30.
LARGEST_CONTEXT = 10**9
COPIED_AT_ONCE = 1 << 24  # bytes

TEMPLATE_PROBES: list[dict[str, Any]] = [
    {"conversations": [[{"role": "user", "content": " <image>\nWhat is the total? "}]], "add_generation_prompt": True},
    {
        "conversations": [
            [
                {"role": "system", "content": "Answer the questions."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello.\n"},
                {"role": "user", "content": "And the date?"},
            ]
        ]
    },
]


@dataclass
class Inspection:
    """A checkpoint directory, read and judged.

    Args:
        source: the directory.
        config: its config, None when it cannot be read.
        weights: what its safetensors files hold.
        files: the text files that adopting writes, by name.
        problems: one sentence for each reason not to adopt it.
        notes: remarks for the user.
    """

    source: Path
    config: Any = None
    weights: WeightReport = field(default_factory=WeightReport)
    files: dict[str, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> Path:
        """The folder with our files for this member of the family."""
        return FOLDERS[self.config.model_type]

    def report(self) -> str:
        """Return the findings as text for people."""
        return self.weights.text(self.source, self.notes, self.problems)


def inspect(source: Path) -> Inspection:
    """Read a checkpoint directory and prepare what adopting would write; nothing is written or run."""
    found = Inspection(source)
    config_class = NemotronVLConfig
    try:
        config_dict = read_json(source / "config.json")
        model = MODELS.get(config_dict.get("model_type"))
        config_class = model.config_class if model else NemotronVLConfig
        found.config = config_class.from_pretrained(source)
    except CheckpointError as error:
        found.problems.append(str(error))
    except (*CONFIG_ERRORS, ImportError) as error:
        found.problems.append(f"config.json is no {config_class.model_type} that can be read: {error}")
    if found.config is None:
        return found
    found.weights = check_weights(source, found.config)
    found.problems += found.weights.problems
    found.notes += found.weights.notes
    announced = config_dict.get("quantization_config")
    if announced and not found.weights.formats and not found.problems:
        method = announced.get("quant_method") if isinstance(announced, dict) else announced
        found.problems.append(
            f"config.json announces weights quantised by {method!r}, but they are plain. The config belongs to other "
            "weights, or its quantization_config has to go."
        )
    for prepare in (config_files, tokenizer_files, processor_files, generation_files):
        try:
            found.files.update(prepare(found, config_dict))
        except CheckpointError as error:
            found.problems.append(str(error))
    found.files.update(code_files(found.config))
    return found


def config_files(found: Inspection, config_dict: dict[str, Any]) -> dict[str, bytes]:
    """config.json in the published keys, with our auto_map; and the index that fits the files."""
    config, weights = found.config, found.weights
    written = json.loads(config.to_json_string())
    noise = json.loads(
        PretrainedConfig().to_json_string(use_diff=False)
    )  # transformers 5 writes the defaults of every config class
    for name, alias in {"llm_config": "text_config", "vision_config": "vision_config"}.items():
        stated = config_dict.get(name) or config_dict.get(alias) or {}
        written[name] = {
            key: value
            for key, value in written[name].items()
            if key in stated or key not in noise or value != noise[key]
        }
    if not written.get("torch_dtype") and main_dtype(weights.tensors):
        written["torch_dtype"] = str(TORCH_DTYPES[main_dtype(weights.tensors)]).removeprefix("torch.")
    files = {"config.json": _json(written)}
    if weights.files != [SINGLE_FILE]:
        files[INDEX_FILE] = _json(make_index(weights.tensors))
    return files


def tokenizer_files(found: Inspection, config_dict: dict[str, Any]) -> dict[str, bytes]:
    """Their tokenizer, in words that transformers 4.57 and 5 read; and the chat template."""
    source, config = found.source, found.config
    path = source / "tokenizer_config.json"
    tokenizer = read_json(path) if path.exists() else {}
    added = _added_tokens(read_json(source / "tokenizer.json"), tokenizer)
    image_token_id = added.get(IMAGE_TOKEN)
    if image_token_id is None:
        found.problems.append(f"The tokenizer has no {IMAGE_TOKEN} token; it is not that of a Nemotron Nano VL model.")
    elif image_token_id != config.image_token_id:
        found.problems.append(
            f"The tokenizer's <image> has id {image_token_id}, config.json's img_context_token_id is "
            f"{config.image_token_id}. One of the two belongs to another checkpoint."
        )
    ids = range(config.llm_config.vocab_size)
    beyond = [token for token, token_id in added.items() if type(token_id) is not int or token_id not in ids]
    if beyond:
        found.problems.append(
            f"The tokenizer's {beyond[0]} has id {added[beyond[0]]!r:.40}, but llm_config.vocab_size is "
            f"{config.llm_config.vocab_size}."
        )
    template = _source_template(source, tokenizer)
    path = source / "special_tokens_map.json"
    tokenizer = _complete_tokenizer_config(found, tokenizer, read_json(path) if path.exists() else {}, added)
    for name in ("bos_token", "eos_token"):
        if name not in tokenizer:
            found.problems.append(f"The tokenizer files name no {name}.")
    special = {name: tokenizer[name] for name in (*NAMED_TOKENS, "additional_special_tokens") if name in tokenizer}
    return {
        "tokenizer.json": (source / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": _json(tokenizer),
        "special_tokens_map.json": _json(_without_type_tags(special)),
        "chat_template.jinja": _choose_template(found, template, tokenizer).encode(),
    }


def _added_tokens(vocabulary: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the control tokens, from tokenizer.json and tokenizer_config.json."""
    try:
        added = {token["content"]: token["id"] for token in vocabulary.get("added_tokens") or []}
        decoder = tokenizer.get("added_tokens_decoder") or {}
        return {**added, **{token["content"]: int(token_id) for token_id, token in decoder.items()}}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"tokenizer.json or tokenizer_config.json has broken added tokens: {error}") from None


def _complete_tokenizer_config(
    found: Inspection, tokenizer: dict[str, Any], special: dict[str, Any], added: dict[str, int]
) -> dict[str, Any]:
    ours = read_json(found.ours / "tokenizer_config.json")
    text_config = found.config.llm_config
    tokenizer = with_keys_of_all_versions(tokenizer)
    if not tokenizer.get("extra_special_tokens"):
        tokenizer.pop("extra_special_tokens", None)
    for name in ("auto_map", "chat_template"):  # foreign code; the template has a file of its own
        tokenizer.pop(name, None)
    for name in NAMED_TOKENS:
        candidates = [tokenizer.get(name), special.get(name), ours[name] if ours[name] in added else None]
        if name == "pad_token":
            candidates += ["<|end_of_text|>" if "<|end_of_text|>" in added else None]
            candidates += [token for token, token_id in added.items() if token_id == text_config.pad_token_id]
            candidates += [tokenizer.get("eos_token")]
        tokenizer[name] = next((token for token in candidates if token), None)
        if tokenizer[name] is None:
            del tokenizer[name]
    length = tokenizer.get("model_max_length")
    if not (isinstance(length, (int, float)) and 0 < length < LARGEST_CONTEXT):
        tokenizer["model_max_length"] = found.config.max_sequence_length
    for name in ("clean_up_tokenization_spaces", "model_input_names", "padding_side"):
        tokenizer.setdefault(name, ours[name])
    return {**tokenizer, "processor_class": ours["processor_class"], "tokenizer_class": ours["tokenizer_class"]}


def _without_type_tags(data: Any) -> Any:
    """Leave out the `__type` that tokenizer_config.json has and special_tokens_map.json has not."""
    if isinstance(data, dict):
        return {key: _without_type_tags(value) for key, value in data.items() if key != "__type"}
    return [_without_type_tags(item) for item in data] if isinstance(data, list) else data


def _source_template(source: Path, tokenizer: dict[str, Any]) -> str | None:
    """Return their template from wherever a version of transformers has put it, None when there is none."""
    path = source / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path.name} is not UTF-8 text: {error}") from None
    template = tokenizer.get("chat_template")
    if template is None and (source / "chat_template.json").exists():
        template = read_json(source / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _choose_template(found: Inspection, template: str | None, tokenizer: dict[str, Any]) -> str:
    """Ours, which also takes lists of parts and marks the assistant's text, unless theirs makes other prompts."""
    ours = (found.ours / "chat_template.jinja").read_text(encoding="utf-8")
    tokens = {name: _text_of(tokenizer.get(name, "")) for name in NAMED_TOKENS}
    if template is None or _prompts_of(template, tokens) == _prompts_of(ours, tokens):
        return ours
    found.notes.append(
        "The source's chat template makes other prompts than the published format; it is kept. Without {% generation %} "
        "in it there are no assistant masks."
    )
    return template


def _text_of(token: str | dict[str, Any]) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"The tokenizer files name a special token without text: {token!r:.80}.")
    return text


def _prompts_of(template: str, tokens: dict[str, str]) -> list[str] | None:
    try:
        return [render_jinja_template(chat_template=template, **probe, **tokens)[0][0] for probe in TEMPLATE_PROBES]
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
        return None  # a template may refuse a conversation


def processor_files(found: Inspection, config_dict: dict[str, Any]) -> dict[str, bytes]:
    """Our image processor with the source's options, and our processor."""
    config, source = found.config, found.source
    options = recipe_of(config)
    if (source / "preprocessor_config.json").exists():
        options |= read_json(source / "preprocessor_config.json")
    elif (source / "processor_config.json").exists():  # transformers 5 saves the image processor inside
        options |= read_json(source / "processor_config.json").get("image_processor") or {}
    else:
        found.notes.append("There is no preprocessor_config.json; the published options are used.")
    options |= {"patch_size": config.patch_size, "downsample_ratio": config.downsample_ratio}
    try:
        preprocessor = NemotronVLImageProcessor.from_dict(options).to_dict()
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"preprocessor_config.json cannot be used: {error}") from None
    if preprocessor["image_size"] != config.force_image_size:
        found.notes.append(
            f"preprocessor_config.json cuts tiles of {preprocessor['image_size']} px, config.json says "
            f"{config.force_image_size} px."
        )
    processor = read_json(found.ours / "processor_config.json") | {"image_tag_type": config.image_tag_type}
    own = read_json(found.ours / "preprocessor_config.json")["auto_map"]  # names the video processor too
    preprocessor["auto_map"] = {**preprocessor["auto_map"], **own, **processor["auto_map"]}
    preprocessor["processor_class"] = processor["processor_class"]
    return {"preprocessor_config.json": _json(preprocessor), "processor_config.json": _json(processor)}


def generation_files(found: Inspection, config_dict: dict[str, Any]) -> dict[str, bytes]:
    """Their generation_config.json, or one with the tokens of the config."""
    path = found.source / "generation_config.json"
    if path.exists():
        read_json(path)
        return {path.name: path.read_bytes()}
    text = found.config.llm_config
    tokens = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {path.name: _json({name: token for name, token in tokens.items() if token is not None})}


def code_files(config: Any) -> dict[str, bytes]:
    """The modules named by an auto_map of ours, and what they import."""
    preprocessor = read_json(ROOT / "preprocessor_config.json")
    auto_maps = [config.auto_map, config.vision_config.auto_map, preprocessor["auto_map"]]
    entries = {reference.split(".")[0] for auto_map in auto_maps for reference in auto_map.values()}
    paths = {ROOT / f"{entry}.py" for entry in entries}
    paths |= {Path(path) for entry in entries for path in get_relative_import_files(ROOT / f"{entry}.py")}
    return {path.name: path.read_bytes() for path in sorted(paths)}


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def check_out(out: Path, found: Inspection, force: bool) -> None:
    """Raise ValueError if `out` is the source or a file, or holds files that adopting does not write."""
    if not out.exists():
        return
    if out.samefile(found.source):
        raise ValueError("--out is the source itself. Choose another directory; linked weights take no space.")
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file. Name a directory.")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in {*found.files, *found.weights.files})
    weights = [name for name in foreign if name.endswith((".safetensors", ".bin")) or name == INDEX_FILE]
    if weights:
        raise ValueError(
            f"{out} holds other weights, which might be loaded instead: {', '.join(weights)}. Remove them."
        )
    if foreign and not force:
        raise ValueError(
            f"{out} holds files of something else: {', '.join(foreign[:4])}. Choose another, or pass --force."
        )


def write(found: Inspection, out: Path, copy: bool = False) -> str:
    """Write the adopted checkpoint, all files complete before the first one appears in `out`.

    Args:
        found: an inspection without problems.
        out: directory to fill; made if absent.
        copy: copy the weights instead of linking them. A copy that was stopped goes on where it was.

    Returns:
        how the weights got there: "hard-linked", "linked" (symbolic) or "copied".

    Raises:
        OSError: if the disk has no room for the copy, before anything is copied.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        staging = out.parent / f".{out.name}.adopting"  # stays when the copy is stopped
        staging.mkdir(exist_ok=True)
        try:
            copy_weights([found.source / name for name in found.weights.files], staging)
        except KeyboardInterrupt:
            print(f"\nStopped. The same command goes on where it was; {staging} holds the copy.", file=sys.stderr)
            raise
        _publish(found, staging, out)
        staging.rmdir()
        return "copied"
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        how = {_link(found.source / name, Path(folder) / name) for name in found.weights.files}
        _publish(found, Path(folder), out)
    return " and ".join(sorted(how))


def _publish(found: Inspection, staging: Path, out: Path) -> None:
    for name, content in found.files.items():
        (staging / name).write_bytes(content)
    out.mkdir(exist_ok=True)
    for name in (*found.weights.files, *found.files):
        os.replace(staging / name, out / name)


def copy_weights(sources: list[Path], folder: Path) -> None:
    """Copy files into a folder, with a bar; what an earlier, stopped copy of the same files left is not copied again.

    Raises:
        OSError: if the disk has no room for what is left to copy, before anything is copied.
    """
    # A file is the same while its size and time are, so a part names both; a part of another file is left behind.
    states = [source.stat() for source in sources]
    parts = [
        folder / f"{source.name}.{state.st_size}.{state.st_mtime_ns}"
        for source, state in zip(sources, states, strict=True)
    ]
    for old in set(folder.iterdir()) - set(parts):
        old.unlink()
    total, done = sum(state.st_size for state in states), sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(folder).free
    if total - done > free:
        raise OSError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and {(total - done) / 1e9:.1f} GB of weights are left to copy. "
            "Make room, choose another --out, or leave out --copy: links take no space."
        )
    with progress(total=total, initial=done, unit="B", unit_scale=True, desc="Copying") as bar:
        for source, part in zip(sources, parts, strict=True):
            with source.open("rb") as reading, part.open("ab") as writing:
                reading.seek(writing.tell())
                while piece := reading.read(COPIED_AT_ONCE):
                    writing.write(piece)
                    bar.update(len(piece))
    for source, state, part in zip(sources, states, parts, strict=True):
        if part.stat().st_size != state.st_size:  # the source has changed, or two commands write the same copy
            part.unlink()
            raise OSError(f"The copy of {source} has another size than it had. Repeat the command.")
        part.replace(folder / source.name)


def _link(source: Path, target: Path) -> str:
    source = source.resolve()  # a Hub cache holds links to its blobs
    try:
        os.link(source, target)
        return "hard-linked"
    except OSError:  # another file system, or a source that is not ours
        target.symlink_to(source)
        return "linked"


def how_to_load(out: Path, quantised: bool = False) -> str:
    """Return the lines a user types next."""
    modes = (
        "\nThe weights stay packed in memory. from_pretrained(..., dequantize=True) unpacks them once, which takes as much "
        "memory as the unquantised model: where nothing multiplies packed weights (docs/quantized.md), it is faster."
    )
    return f"""Load it:
  from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
  path = {str(out)!r}
  model = AutoModel.from_pretrained(path, dtype="auto", trust_remote_code=True).eval()
  tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
  images = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)(["page.png"])
  print(model.chat(tokenizer, question="What is the total?", generation_config={{"do_sample": False}}, **images)){modes if quantised else ""}"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the checkpoint is fine (and written), 1 otherwise, 2 when the command is wrong."""
    parser = command_parser("adopt", __doc__)
    parser.add_argument("source", type=Path, help="directory of a downloaded checkpoint")
    parser.add_argument("--out", type=Path, help="directory to write")
    parser.add_argument("--check", action="store_true", help="only report; reads every weight")
    parser.add_argument("--copy", action="store_true", help="copy the weights instead of linking them")
    parser.add_argument("--force", action="store_true", help="write into a directory that holds other files")
    arguments = parser.parse_args(argv)
    if not arguments.check and arguments.out is None:
        parser.error("give --out DIR, or --check")
    require_directory(arguments.source)
    found = inspect(arguments.source)
    if arguments.check and found.weights.tensors and not found.weights.problems:
        found.problems += check_values(found.weights)
    if not arguments.check and not found.problems:
        check_out(arguments.out, found, arguments.force)
    print(found.report())
    if found.problems or arguments.check:
        return int(bool(found.problems))
    how = write(found, arguments.out, arguments.copy)
    print(
        f"{arguments.out} is ready, its weights are {how}.\n{how_to_load(arguments.out, bool(found.weights.formats))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
