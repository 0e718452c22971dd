"""Check the weights of a checkpoint directory against the model of its config, reading headers only.

    python -m tools.weights DIR    # `python -m tools.adopt DIR --check` also checks the other files, and every number

`check_weights(folder, config)` lists what the safetensors files hold, compares name, shape and dtype of every tensor
with the model built on the meta device, and returns the problems as sentences. No weight is read and nothing is run.
`check_values` does read the weights, for NaN and infinity.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from nemotron_vl.checkpoint import (
    INDEX_FILE,
    PREFIX_TOKENS_KEY,
    SINGLE_FILE,
    CheckpointError,
    TensorHeader,
    read_header,
    read_index,
    read_json,
)
from nemotron_vl.configuration_nemotron_vl import MIXTURE_OF_EXPERTS
from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL, NemotronH_Nano_VL_V2
from nemotron_vl.quantization_nemotron_vl import is_quantised, pack_linears, packed_linears
from safetensors import safe_open

from .command_line import command_parser, progress, require_checkpoint

# The classes of the family by the model_type of their configs.
MODELS = {model.config_class.model_type: model for model in (Llama_Nemotron_Nano_VL, NemotronH_Nano_VL_V2)}

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

VALUES_AT_ONCE = 1 << 24  # numbers looked at together
PLAIN_DTYPES = ("BF16", "F16", "F32")

# A fingerprint reads so many places of a file of weights, of so many bytes.
FINGERPRINT_PLACES, FINGERPRINT_BYTES = 256, 4096

# What building a config or a model out of a broken config.json raises.
CONFIG_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    OSError,
    StrictDataclassError,
)


def fingerprint(folder: Path) -> str:
    """Return a short digest of a checkpoint: its JSON files, and the size and 256 places of each file of weights.

    Reading 17 GB whole takes longer than many answers; another training or format changes these places too.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for place in range(FINGERPRINT_PLACES):
                file.seek(max(0, size - FINGERPRINT_BYTES) * place // (FINGERPRINT_PLACES - 1))
                digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


@dataclass
class WeightReport:
    """What a folder holds.

    Args:
        tensors: every stored tensor by name.
        files: the safetensors files that hold them.
        formats: how many layers have which quantised format; empty for plain weights.
        problems: one sentence for each thing that is wrong; empty when the weights fit the config.
        notes: remarks that do not keep the weights from loading.
    """

    tensors: dict[str, TensorHeader] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self, folder: Path, notes: list[str], problems: list[str]) -> str:
        """Return what was found in `folder`, with the notes and problems given, as lines for people."""
        num_bytes = sum(tensor.num_bytes for tensor in self.tensors.values())
        counted = (
            f"{len(self.tensors)} tensors, {num_bytes / 1e9:.3f} GB, mostly {main_dtype(self.tensors) or 'not plain'}"
        )
        lines = [
            f"{folder}: {counted}, in {len(self.files)} files" if self.tensors else f"{folder}: no tensors were read"
        ]
        lines += [f"  format:  {count} layers are {name}" for name, count in self.formats.items()]
        lines += [f"  note:    {note}" for note in notes]
        lines += [f"  PROBLEM: {problem}" for problem in problems]
        lines.append(f"{len(problems)} problems." if problems else "Every tensor fits the model.")
        return "\n".join(lines)


def model_class(folder: Path) -> Any:
    """Return the class that the checkpoint in a folder is of, by its config.json.

    Raises:
        ValueError: if `folder` is no directory with a config.json, or that is unreadable or of another family.
    """
    require_checkpoint(folder)
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in MODELS:
        raise CheckpointError(f"{folder}: config.json says model_type {model_type!r}; known are {', '.join(MODELS)}.")
    return MODELS[model_type]


def find_weight_files(folder: Path, report: WeightReport) -> dict[str, str]:
    """Fill `report.files` with the files transformers would load, and return the index's weight map (may be empty).

    Raises:
        CheckpointError: if the index is damaged.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        refused = f"the pickle files {_some(pickles)} are not used: loading a pickle can run any code"
        if not present:
            report.problems.append(f"There is no safetensors file, and {refused}. Download the safetensors weights.")
            return {}
        report.notes.append(refused[0].upper() + refused[1:] + ".")
    if (folder / INDEX_FILE).exists():
        weight_map = read_index(folder / INDEX_FILE)["weight_map"]
        named = sorted(set(weight_map.values()))
        absent = [name for name in named if name not in present]
        if absent:
            report.problems.append(
                f"{INDEX_FILE} names files that are absent: {_some(absent)}. Finish the download first."
            )
        if SINGLE_FILE in present and SINGLE_FILE not in named:
            report.problems.append(
                f"Both {SINGLE_FILE} and the files of {INDEX_FILE} are here, and transformers would load the first. "
                "Remove the one that does not belong."
            )
        report.files = [name for name in named if name in present]
        ignored = [name for name in present if name not in named]
        if ignored:
            report.notes.append(f"{INDEX_FILE} does not name {_some(ignored)}; left out.")
        return weight_map
    report.files = [SINGLE_FILE] if SINGLE_FILE in present else present
    if len(report.files) > 1:
        report.notes.append(f"There is no {INDEX_FILE}; all {len(present)} safetensors files belong to the model.")
    if not present:
        report.problems.append("There is no safetensors file. Download the whole checkpoint.")
    return {}


def read_tensors(folder: Path, report: WeightReport) -> None:
    """Fill `report.tensors` from the headers of the files that belong to the model."""
    weight_map = find_weight_files(folder, report)
    for name in report.files:
        try:
            tensors = read_header(folder / name)
        except CheckpointError as error:
            report.problems.append(str(error))
            continue
        twice = sorted(tensors.keys() & report.tensors.keys())
        if twice:
            files = sorted({_file_name(report.tensors[tensor]) for tensor in twice})
            report.problems.append(
                f"{len(twice)} tensors are stored twice, in {name} and in {_some(files)}: {_some(twice)}."
            )
        report.tensors.update(tensors)
    found = {name: _file_name(tensor) for name, tensor in report.tensors.items()}
    wrong = [name for name, file in weight_map.items() if found.get(name, file) != file]
    wrong += [name for name in found if weight_map and name not in weight_map]
    if wrong:
        report.notes.append(
            f"{INDEX_FILE} is wrong about {len(wrong)} tensors ({_some(wrong)}); the headers of the files count."
        )


def _file_name(tensor: TensorHeader) -> str:
    return Path(tensor.file).name


def expected_tensors(
    config: Any, tensors: Mapping[str, TensorHeader]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int], set[str]]:
    """Return what the model of `config` saves when its weights are stored as `tensors` are.

    Args:
        config: the config; its model is built on the meta device.
        tensors: everything the checkpoint stores; layers that it stores quantised are expected quantised.

    Returns:
        name and shape of every tensor; how many layers have which quantised format; the names of their tensors.

    Raises:
        ValueError: if a quantised layer is incomplete, of another shape, or of an unknown format.
    """
    with torch.device("meta"):
        model = MODELS[config.model_type](config)
        formats = pack_linears(model, tensors)
    packed = {f"{name}.{key}" for name, layer in packed_linears(model) for key in layer.packed_tensors()}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, formats, packed


def is_optional(name: str, config: Any) -> bool:
    """Say whether a checkpoint may leave the tensor out: the config can make it, or it is tied to another."""
    tied = config.llm_config.tie_word_embeddings and name == "language_model.lm_head.weight"
    return tied or name.rpartition(".")[2] in ("norm_mean", "norm_std")


def check_weights(folder: Path, config: Any) -> WeightReport:
    """Compare the safetensors files of `folder` with the model of `config`.

    The tower's class and register tokens are counted in their tensor; a config that says otherwise is corrected.
    """
    report = WeightReport()
    try:
        read_tensors(folder, report)
    except CheckpointError as error:
        report.problems.append(str(error))
    if not report.tensors:
        return report
    whole_files_are_missing = bool(report.problems)
    if any(".mixer.experts." in name for name in report.tensors):
        report.problems.append(MIXTURE_OF_EXPERTS)
        return report
    count_prefix_tokens(config.vision_config, report)
    for name in ("llm_config", "vision_config"):
        num_layers = getattr(config, name).num_hidden_layers
        if num_layers > len(report.tensors):  # building such a model might never end
            report.problems.append(
                f"config.json asks for {num_layers} layers in {name}, but only {len(report.tensors)} tensors are here."
            )
            return report
    if whole_files_are_missing and any(is_quantised(name, tensor) for name, tensor in report.tensors.items()):
        return report  # the scales of a layer may be in a file that cannot be read
    try:
        expected, report.formats, packed = expected_tensors(config, report.tensors)
    except CONFIG_ERRORS as error:
        report.problems.append(f"config.json describes no model that holds these weights: {error}")
        return report
    if whole_files_are_missing:
        # What an unreadable file should hold is not missing a second time.
        expected = {name: shape for name, shape in expected.items() if name in report.tensors}
    report.problems += compare(expected, report.tensors, config, packed)
    report.notes += remarks(expected, {n: t for n, t in report.tensors.items() if n not in packed}, config)
    return report


def count_prefix_tokens(vision_config: Any, report: WeightReport) -> None:
    """Make the config count as many class and register tokens as the checkpoint holds."""
    stored = report.tensors[PREFIX_TOKENS_KEY].shape[0] if PREFIX_TOKENS_KEY in report.tensors else None
    if stored in (None, vision_config.num_prefix_tokens) or stored < vision_config.num_cls_tokens:
        return
    report.notes.append(
        f"{PREFIX_TOKENS_KEY} holds {stored} tokens, the config counts {vision_config.num_prefix_tokens}; the tensor is "
        "right."
    )
    vision_config.num_registers = stored - vision_config.num_cls_tokens
    vision_config.args["cpe_num_registers"] = vision_config.num_registers  # goes before register_multiple


def check_values(report: WeightReport) -> list[str]:
    """Read every number of the plain weights, and return a sentence if some are NaN or infinite."""
    broken = []
    plain = {key: tensor for key, tensor in report.tensors.items() if tensor.dtype in PLAIN_DTYPES}
    total = sum(tensor.num_bytes for tensor in plain.values())
    with progress(total=total, unit="B", unit_scale=True, desc="Reading") as bar:
        for file_name in sorted({tensor.file for tensor in plain.values()}):
            with safe_open(file_name, framework="pt") as file:
                for key in sorted(key for key, tensor in plain.items() if tensor.file == file_name):
                    pieces = file.get_tensor(key).flatten().split(VALUES_AT_ONCE)
                    num_broken = sum(int(piece.isfinite().logical_not().sum()) for piece in pieces)
                    broken += [f"{num_broken} of {key}"] if num_broken else []
                    bar.update(plain[key].num_bytes)
    if not broken:
        return []
    return [f"{len(broken)} tensors hold numbers that are NaN or infinite: {_some(broken)}. Download them again."]


def compare(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorHeader], config: Any, packed: set[str]
) -> list[str]:
    """Return one sentence for each kind of difference between weights and model; `packed` names quantised tensors."""
    missing = sorted(name for name in expected if name not in found and not is_optional(name, config))
    unexpected = sorted(name for name in found if name not in expected and not name.endswith("summary_idxs"))
    both = expected.keys() & found.keys()
    shapes = [
        f"{name} is {list(found[name].shape)}, the config asks for {list(expected[name])}"
        for name in sorted(both)
        if found[name].shape != expected[name]
    ]
    dtypes = [
        f"{name} is {found[name].dtype}" for name in sorted(both - packed) if found[name].dtype not in PLAIN_DTYPES
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}.")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors do not belong to this model: {_some(unexpected)}.")
    if shapes:
        problems.append(f"{len(shapes)} tensors have a wrong shape: {_some(shapes, '; ')}.")
    if dtypes:
        problems.append(f"{len(dtypes)} tensors are not {', '.join(PLAIN_DTYPES)}: {_some(dtypes, '; ')}.")
    return problems


def remarks(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorHeader], config: Any) -> list[str]:
    """Return what is worth knowing about weights that fit."""
    notes = []
    absent = sorted(name for name in expected if name not in found and is_optional(name, config))
    if absent:
        notes.append(f"{_some(absent)} are not stored; the config gives them.")
    surplus = sorted(name for name in found if name.endswith("summary_idxs"))
    if surplus:
        notes.append(f"{_some(surplus)} is stored and not needed: the config gives it.")
    dtype = main_dtype(found)
    others = sorted({tensor.dtype for tensor in found.values()} - {dtype, "I64"})
    if others:
        notes.append(f"Most weights are {dtype}, some are {', '.join(others)}.")
    return notes


def main_dtype(tensors: Mapping[str, TensorHeader]) -> str:
    """Return the plain dtype that holds most bytes, by its safetensors name; "" when there is none."""
    sizes = {dtype: sum(t.num_bytes for t in tensors.values() if t.dtype == dtype) for dtype in PLAIN_DTYPES}
    largest = max(sizes, key=lambda dtype: sizes[dtype])
    return largest if sizes[largest] else ""


def make_index(tensors: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json: tensor to file, and the bytes of all tensors."""
    return {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
        "weight_map": {name: _file_name(tensors[name]) for name in sorted(tensors)},
    }


def _some(names: Iterable[str], separator: str = ", ", limit: int = 4) -> str:
    names = list(names)
    shown = separator.join(names[:limit])
    return shown if len(names) <= limit else f"{shown}{separator}and {len(names) - limit} more"


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the weights fit the model, 1 otherwise."""
    parser = command_parser("weights", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory of a checkpoint")
    folder = parser.parse_args(argv).directory
    report = check_weights(folder, model_class(folder).config_class.from_pretrained(folder))
    print(report.text(folder, report.notes, report.problems))
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
