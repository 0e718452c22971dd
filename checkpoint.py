"""Finds the files of a checkpoint and checks that they are complete and belong to this model.

config.json, the index and the headers of the safetensors files are read once, into a `Checkpoint`. No weight is read.
`StrictPreTrainedModel` loads such a checkpoint completely, or raises an error.
"""

import contextlib
import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX_FILE
from transformers.utils import SAFE_WEIGHTS_NAME as SINGLE_FILE
from transformers.utils import hub

from .configuration_nemotron_vl import HUB_ARGUMENTS, MIXTURE_OF_EXPERTS

# Arguments of `from_pretrained` that are never written into the config, whatever attributes it has.
NO_CONFIG_OVERRIDES = (
    *("config", "dtype", "torch_dtype", "quantization_config", "attn_implementation", "trust_remote_code"),
    *("dequantize", "use_safetensors", "output_loading_info", "generation_config"),
)
PREFIX_TOKENS_KEY = "vision_model.radio_model.model.patch_generator.cls_token.token"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MOST_PARAMETERS_PER_BYTE = 2  # of a weight file; two weights of 4 bits fill a byte

# The torch dtypes in which tensors are read here, by their names in safetensors.
TORCH_DTYPES = {
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}


class CheckpointError(ValueError):
    """A file of a checkpoint that cannot be used; the message says which, why, and what to do."""


class TensorHeader(NamedTuple):
    """What the header of a safetensors file says about a tensor: its dtype by name, its shape, and its byte range."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int = 0
    end: int = 0

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, by its dtype and shape."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def read(self) -> torch.Tensor:
        """Return the tensor exactly as stored."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(self.end - self.start))
        return torch.frombuffer(data, dtype=TORCH_DTYPES[self.dtype]).reshape(self.shape)


# --- single files ---


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is absent, is not JSON, or holds something else than an object.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing. Download the whole checkpoint.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON{_lfs_remark(path)} ({error}). Download it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} holds a {type(data).__name__}, not a JSON object. Download it again.")
    return data


def read_index(path: Path) -> dict[str, Any]:
    """Read the index of a sharded checkpoint.

    Returns:
        its content. `weight_map` gives file names by tensor names; all of them lie beside the index and have the suffix
        of safetensors files: others would be opened as pickles.

    Raises:
        CheckpointError: if the file is no such index.
    """
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path} has no weight_map, which names the files that lie beside it. Download it again."
        )
    foreign = [str(file) for file in weight_map.values() if not _is_plain_name(file)]
    if foreign:
        raise CheckpointError(
            f"{path} names files that do not lie in the directory, or are no safetensors files: "
            f"{', '.join(map(repr, foreign[:4]))}. It must name files that lie beside it; download it again."
        )
    return index


def _is_plain_name(file: Any) -> bool:
    return isinstance(file, str) and Path(file).name == file and "\\" not in file and file.endswith(".safetensors")


def read_header(path: str | os.PathLike) -> dict[str, TensorHeader]:
    """Read the header of a safetensors file, and check that the file has the length that the header says.

    Raises:
        CheckpointError: if the file is truncated, longer than its header says, or no safetensors file.
    """
    path = os.fspath(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        # A web page instead of a file, or a git-lfs pointer, gives an absurd size.
        text = file.read(header_bytes) if header_bytes <= min(size - 8, MAX_HEADER_BYTES) else None
    if text is None:
        raise CheckpointError(
            f"{path} ({size} bytes) is not a whole safetensors file{_lfs_remark(path)}. Download it again."
        )
    data = 8 + header_bytes
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        headers = {}
        for name, entry in entries.items():
            start, end = map(int, entry["data_offsets"])
            headers[name] = TensorHeader(
                entry["dtype"], tuple(map(int, entry["shape"])), path, data + start, data + end
            )
        end = data
        for name, header in sorted(headers.items(), key=lambda item: item[1][-2:]):
            fits = header.start == end and header.end - end == header.num_bytes
            if not fits or min(header.shape, default=0) < 0:
                raise ValueError(f"bytes {header.start - data} to {header.end - data} do not fit {name}, {header}")
            end = header.end
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a broken safetensors header ({error!r:.160}). Download it again."
        ) from error
    if size != end:
        what = "is truncated" if size < end else "has surplus bytes"
        raise CheckpointError(f"{path} {what}: {size} bytes instead of {end}. Download it again.")
    return headers


def read_headers(files: Sequence[str | os.PathLike]) -> dict[str, TensorHeader]:
    """Read the headers of several safetensors files, as `read_header` does."""
    headers: dict[str, TensorHeader] = {}
    for path in files:
        headers.update(read_header(path))
    return headers


def _lfs_remark(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        is_pointer = file.read(40).startswith(b"version https://git-lfs")
    return ", it is a git-lfs pointer: run `git lfs pull` where it comes from" if is_pointer else ""


# --- the whole checkpoint ---


@dataclass(frozen=True)
class Checkpoint:
    """The source, headers and config of a checkpoint that `from_pretrained` is about to load.

    Args:
        source: the directory or Hub id that `from_pretrained` was called with, or None.
        headers: the headers of all tensors in the safetensors files, by tensor name. They are empty if transformers
            would load no such file (weights given by hand, a gguf file, the directory of an adapter).
        config: the checkpoint's config, which loading may change; None without headers.
    """

    source: str | os.PathLike | None
    headers: dict[str, TensorHeader]
    config: PretrainedConfig | None

    @classmethod
    def read(
        cls,
        source: str | os.PathLike | None,
        config_class: type[PretrainedConfig],
        kwargs: Mapping[str, Any],
    ) -> tuple["Checkpoint", dict[str, Any]]:
        """Read config, index and headers.

        Args:
            source: directory or Hub id, as `from_pretrained` takes it.
            config_class: the configuration class of the model.
            kwargs: what `from_pretrained` was called with.

        Returns:
            the checkpoint, and the arguments for transformers. These have `config`, and lack the arguments that are
            attributes of the config: they were written into it.

        Raises:
            ValueError: for damaged files, and for the `.pt` files of llm-awq.
            OSError: if a file that the index names, or config.json, is not there.
        """
        if source is None or kwargs.get("gguf_file") is not None:
            return cls(source, {}, None), dict(kwargs)
        headers = read_headers(find_files(source, kwargs))
        if not headers:
            return cls(source, {}, None), dict(kwargs)
        config, kwargs = _read_config(source, config_class, kwargs)
        return cls(source, headers, config), {**kwargs, "config": config}

    @property
    def files(self) -> list[str]:
        """The safetensors files."""
        return sorted({header.file for header in self.headers.values()})

    def check_fits(self, model_class: type[PreTrainedModel], check_size: bool = True) -> None:
        """Raise if the weights cannot be those of the model.

        Args:
            model_class: the class that will be loaded.
            check_size: also raise if the files are far too small for the model. Otherwise transformers would first
                allocate the missing weights.

        Raises:
            ValueError: for the weights of the omni model, if the config has another number of class and register
                tokens than the weights, and for files that are too small.
        """
        if self.config is None:
            return
        vision_config = getattr(self.config, "vision_config", None)
        if vision_config is not None:  # a tower loaded alone may come from any checkpoint
            if any(".mixer.experts." in name for name in self.headers):
                raise ValueError(MIXTURE_OF_EXPERTS)
            self._check_prefix_tokens(vision_config)
        if check_size:
            self._check_size(model_class)

    def _check_prefix_tokens(self, vision_config: PretrainedConfig) -> None:
        token = self.headers.get(PREFIX_TOKENS_KEY)
        if token is not None and token.shape[0] != vision_config.num_prefix_tokens:
            raise ValueError(
                f"{PREFIX_TOKENS_KEY} holds {token.shape[0]} class and register tokens, but vision_config counts "
                f"{vision_config.num_prefix_tokens} (num_cls_tokens={vision_config.num_cls_tokens}, num_registers="
                f"{vision_config.num_registers}). `python -m tools.adopt` writes the count of the tensor into the "
                "config."
            )

    def _check_size(self, model_class: type[PreTrainedModel]) -> None:
        parts = [self.config, *(getattr(self.config, name, None) for name in ("llm_config", "vision_config"))]
        num_layers = max(getattr(part, "num_hidden_layers", 0) for part in parts)
        if num_layers > len(self.headers):  # building such a model might take for ever
            raise ValueError(
                f"The config of {self.source} describes a model of {num_layers} layers, but the files beside it hold "
                f"only {len(self.headers)} tensors. The config belongs to another checkpoint."
            )
        config = copy.deepcopy(self.config)  # a model writes into its config
        config._attn_implementation = "eager"  # the model will not run
        with torch.device("meta"):
            num_parameters = model_class(config).num_parameters()
        num_bytes = sum(os.path.getsize(file) for file in self.files)
        if num_bytes < num_parameters / MOST_PARAMETERS_PER_BYTE:
            raise ValueError(
                f"The config of {self.source} describes a model of {num_parameters} parameters, but the weights beside "
                f"it have only {num_bytes} bytes. The download is incomplete, or the config belongs to another "
                "checkpoint."
            )


def find_files(source: str | os.PathLike, kwargs: Mapping[str, Any]) -> list[str]:
    """Find the safetensors files that transformers would load; the result may be empty.

    Args:
        source: directory or Hub id.
        kwargs: arguments of `from_pretrained`, of which those for the Hub and `variant` are used.

    Raises:
        ValueError: for the `.pt` files of llm-awq, and for a damaged index.
        FileNotFoundError: if the index names a file that is not there.
    """
    path = os.fspath(source)
    if path.endswith(".pt"):
        _refuse_llm_awq(path)
    hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    for name in (SINGLE_FILE, INDEX_FILE):
        if kwargs.get("variant"):
            stem, suffix = name.rsplit(".", 1)
            name = f"{stem}.{kwargs['variant']}.{suffix}"
        file = hub.cached_file(
            path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_kwargs,
        )
        if file is not None:
            return [file] if name.endswith(".safetensors") else _find_shards(path, Path(file), hub_kwargs)
    folder = os.path.join(path, kwargs.get("subfolder") or "")
    pickles = sorted(name for name in os.listdir(folder) if name.endswith(".pt")) if os.path.isdir(folder) else []
    if pickles:
        _refuse_llm_awq(os.path.join(folder, pickles[0]))
    return []


def _refuse_llm_awq(path: str) -> None:
    raise ValueError(
        f"{path} is a pickled torch file as llm-awq (TinyChat) writes them; it is not loaded. Quantise the BF16 "
        "checkpoint into AutoAWQ's safetensors layout with `python -m tools.quantize DIR --format awq --out DIR`."
    )


def _find_shards(source: str, index_file: Path, hub_kwargs: dict[str, Any]) -> list[str]:
    index = read_index(index_file)
    if not isinstance(index.get("metadata"), dict):  # transformers reads it
        raise CheckpointError(f"{index_file} is no index of weights: it has no 'metadata'. Download it again.")
    names = sorted(set(index["weight_map"].values()))
    files = hub.cached_files(source, names, _raise_exceptions_for_missing_entries=False, **hub_kwargs) or []
    absent = sorted(set(names) - {Path(file).name for file in files})
    if not files:  # as in the root of our repository
        raise FileNotFoundError(
            f"{source} holds none of the {len(names)} weight files that its {index_file.name} names: download them, "
            "put this code beside downloaded weights with `python -m tools.adopt WEIGHTS`, or load the small model of "
            'the code\'s own repository with subfolder="nano".'
        )
    if absent:
        raise FileNotFoundError(
            f"{index_file} names {len(names)} files, of which {', '.join(absent)} is not there. Download it."
        )
    return files


def _read_config(
    source: str | os.PathLike, config_class: type[PretrainedConfig], kwargs: Mapping[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return a config that the caller may change, and the arguments that are not attributes of the config.

    Arguments that are attributes override the config, as in transformers.
    """
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        return copy.deepcopy(config), dict(kwargs)
    hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    others = {
        name: value
        for name, value in kwargs.items()
        if not name.startswith("_") and name not in (*NO_CONFIG_OVERRIDES, *HUB_ARGUMENTS)
    }
    config, unused = config_class.from_pretrained(config or source, return_unused_kwargs=True, **hub_kwargs, **others)
    went_in = {name for name in others if name not in unused and hasattr(config, name)}
    return config, {name: value for name, value in kwargs.items() if name not in went_in}


# --- loading ---


class StrictPreTrainedModel(PreTrainedModel):
    """A model that loads complete checkpoints only, and only from safetensors files."""

    # The parts of transformers' loading report that raise an error here.
    _refused_on_load = ("missing_keys", "unexpected_keys")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> "StrictPreTrainedModel":
        """Load a checkpoint as transformers does, and raise an error unless its weights are those of this model.

        Only safetensors files are read, because a pickle can run any code while it is loaded.

        Args:
            pretrained_model_name_or_path: directory or Hub id.
            args, kwargs: as for `PreTrainedModel.from_pretrained`. With `output_loading_info=True`, missing and
                surplus weights raise no error; the caller gets the report instead.

        Raises:
            ValueError: if the checkpoint lacks weights of the model or has others (the message names them), if a file
                of weights is damaged, or if the index names files outside the directory.
            OSError: if files are absent.
            ImportError: if flash-attn is requested and not installed.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                "Only safetensors weights are loaded: a pickle can run any code. Leave use_safetensors out."
            )
        wants_info = kwargs.pop("output_loading_info", False)
        checkpoint, kwargs = Checkpoint.read(pretrained_model_name_or_path, cls.config_class, kwargs)
        kwargs, finish = cls._prepare_loading(checkpoint, kwargs)
        checkpoint.check_fits(cls, check_size=not wants_info)
        with _explain_missing_flash_attention():
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        problems = {kind: sorted(info[kind]) for kind in cls._refused_on_load if info[kind]}
        if problems and not wants_info and pretrained_model_name_or_path is not None:  # not for weights by hand
            shown = "; ".join(
                f"{len(keys)} {kind.replace('_', ' ')}: {', '.join(keys[:4])}" for kind, keys in problems.items()
            )
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold exactly the weights of this model: {shown}. The "
                "download is incomplete, or its config.json belongs to another checkpoint."
            )
        finish(model)
        return (model, info) if wants_info else model

    @classmethod
    def _prepare_loading(
        cls, checkpoint: Checkpoint, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[nn.Module], None]]:
        """Return the arguments for transformers, and what to do with the model after loading."""
        return kwargs, lambda model: None


@contextlib.contextmanager
def _explain_missing_flash_attention() -> Iterator[None]:
    """Add the remedy to transformers' error for an attention whose package is absent."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if not str(error).startswith("FlashAttention"):
            raise
        raise ImportError(
            f"{error} Install it (`pip install flash-attn --no-build-isolation`, it needs CUDA), or leave "
            "attn_implementation out: the default, sdpa, needs nothing."
        ) from error
