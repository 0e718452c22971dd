"""Configurations of Nemotron Nano VL: the 8B V1 (`NemotronVLConfig`), the 12B V2 (`NemotronVLV2Config`) and the
C-RADIOv2 tower of both (`RADIOConfig`).

All read the JSON that NVIDIA publishes as it is and write the same keys back. A config only describes: a foreign
`auto_map` in it, also inside `vision_config`, is replaced by ours and never followed.
"""

import copy
import json
import math
import os
from typing import Any

from transformers import LlamaConfig
from transformers import __version__ as transformers_version
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import hub, logging

try:
    from transformers import NemotronHConfig
except ImportError:  # transformers 4.57
    NemotronHConfig = None

logger = logging.get_logger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# By the timm names that C-RADIO configs have in `args.model`: (hidden_size, num_hidden_layers, num_attention_heads).
VIT_SIZES = {
    "vit_tiny_patch16_224": (192, 12, 3),
    "vit_small_patch16_224": (384, 12, 6),
    "vit_base_patch16_224": (768, 12, 12),
    "vit_large_patch16_224": (1024, 24, 16),
    "vit_huge_patch16_224": (1280, 32, 16),
}

LLAMA_3_1_8B = {
    "vocab_size": 128512,  # 128,256 of Llama 3.1 and 9 image tokens, padded to a multiple of 512
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}

NEMOTRON_NANO_12B_V2 = {
    "vocab_size": 132096,  # 131,072 of the text model, the image and video tokens, and padding
    "hidden_size": 5120,
    "intermediate_size": 20480,
    "num_hidden_layers": 62,
    "hybrid_override_pattern": 6 * "M-M-M-M*-" + "M-M-M-M-",  # M: Mamba2, -: MLP, *: attention
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mlp_hidden_act": "relu2",
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 12,
}
# What transformers' NemotronHConfig saves beside the published keys: its own form of the layer pattern, which the
# classes of NVIDIA and vLLM refuse to set, and the settings of layers that the 12B V2 does not have.
NATIVE_NEMOTRON_H_KEYS = (
    *("layers_block_type", "layer_types", "mtp_layers_block_type", "num_nextn_predict_layers"),
    *("moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap"),
    *("n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok"),
    *("output_router_logits", "routed_scaling_factor", "topk_group"),
)
MIXTURE_OF_EXPERTS = (
    "This checkpoint has mixture-of-experts layers ('E' in llm_config.hybrid_override_pattern): it is a pre-release of "
    "the omni model, which shares the architecture's name with the 12B V2 but has another tower input and other tokens. "
    "Load it with its own code."
)
NEEDED_FOR_V2 = (
    "The 12B V2 needs transformers 5.23 or later, whose NemotronH is its language model; this is {version}. "
    "pip install -U transformers."
)

# Upper bounds of sizes and of lengths, so that a corrupt config fails before memory is allocated for it. They are far
# above every released model.
MAX_SIZE = 1 << 24
MAX_LENGTH = 1 << 30
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "patch_size", "max_resolution", "max_image_size", "num_cls_tokens", "num_registers"),
    *("force_image_size", "vit_hidden_size", "projector_hidden_size", "mamba_num_heads", "mamba_head_dim"),
    *("ssm_state_size", "n_groups", "conv_kernel", "chunk_size"),
)
LENGTHS = ("max_position_embeddings", "max_sequence_length", "vision_batch_size")

# The arguments of `from_pretrained` that say where on the Hub, or in a directory, files are found.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")

IMAGE_TOKEN = "<image>"

WEIGHT_DTYPES = ("bfloat16", "float16", "float32", "float64")

# What every transformers config has; in a sub-config on disk the defaults of these say nothing.
GENERIC_KEYS = (
    "architectures",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)


def _agree(name: str, *values_with_sources: tuple[Any, str], default: Any = None) -> Any:
    """Return the one value that the given `(value, source)` pairs state, `default` when all are None.

    Raises:
        ValueError: if two sources state different values; the message holds both.
    """
    stated = [(value, source) for value, source in values_with_sources if value is not None]
    for value, source in stated[1:]:
        if value != stated[0][0]:
            raise ValueError(
                f"The config contradicts itself about {name}: {stated[0][1]} says {stated[0][0]!r}, "
                f"{source} says {value!r}. Keep the right one."
            )
    return stated[0][0] if stated else default


def _check_sizes(part: str, values: dict[str, Any]) -> None:
    """Raise for sizes and lengths that are absurd or no whole numbers; None passes."""
    largest = {**dict.fromkeys(SIZES, MAX_SIZE), **dict.fromkeys(LENGTHS, MAX_LENGTH)}
    for name in values.keys() & largest.keys():
        size, smallest = values[name], 0 if name == "num_registers" else 1
        if size is not None and not (type(size) is int and smallest <= size <= largest[name]):
            raise ValueError(f"{part}{name} must be a whole number in {smallest}..{largest[name]}, got {size!r}.")


def _check_dtype(part: str, values: dict[str, Any]) -> None:
    """Raise for a dtype of weights that is none; transformers would ask torch for any attribute of that name."""
    for key in ("dtype", "torch_dtype"):
        dtype = values.get(key)
        named = isinstance(dtype, str) and dtype.removeprefix("torch.") in WEIGHT_DTYPES
        # torch.dtype without importing torch, which configs do not need.
        if not (dtype is None or named or type(dtype).__name__ == "dtype"):
            raise ValueError(f"{part}{key} must be one of {', '.join(WEIGHT_DTYPES)}, got {dtype!r:.80}.")


def _published_form(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Write what transformers 5 renamed the way every version, vLLM and NVIDIA's own code read it."""
    published = dict(config_dict)
    if "dtype" in published:
        published["torch_dtype"] = published.pop("dtype")
    if "rope_parameters" in published:
        rope = dict(published.pop("rope_parameters") or {})
        if "rope_theta" in rope:
            published["rope_theta"] = rope.pop("rope_theta")
        published["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return published


class RADIOConfig(PretrainedConfig):
    """Configuration of the C-RADIOv2 vision transformer.

    Sizes may be given directly or, as published, through `args` under timm's names; given both ways they must agree.

    Args:
        args: the training arguments that C-RADIO publishes. Read: `model`, `model_kwargs` (`embed_dim`, `depth`,
            `num_heads`, `mlp_ratio`), `cpe_max_size`, `teachers`, `cls_token_per_teacher`, `register_multiple`,
            `cpe_num_registers`, `model_norm`. Kept as they are for other runtimes.
        version: name of the C-RADIO release.
        patch_size: side of a patch in pixels.
        max_resolution: largest image side in pixels.
        preferred_resolution: (height, width) in pixels the tower was tuned for; information only.
        adaptor_names: teacher heads to attach; only None is supported, features do not depend on them.
        vitdet_window_size: window attention; only None is supported.
        feature_normalizer_config: feature standardisation; only None is supported.
        hidden_size: width of the transformer.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block.
        intermediate_size: width inside a block's MLP.
        layer_norm_eps: epsilon of every LayerNorm.
        num_cls_tokens: class tokens before the patches, one per teacher.
        num_registers: register tokens after the class tokens.
        summary_idxs: class tokens that form the summary output.
        use_final_norm: LayerNorm after the last block (`args.model_norm`); False in the released models.
        max_image_size: side in pixels of the square image that the position table covers (`args.cpe_max_size`).
        external_normalization: the images come normalised, and the input conditioner leaves them as they are (12B
            V2, where RADIO calls it an external preprocessor).
        align_corners: sampling of the position-table resize; True is what the published tower code does.
        norm_mean, norm_std: RGB statistics of the input conditioner, for pixels in 0..1.
        initializer_range: standard deviation of fresh weights.

    Raises:
        ValueError: for contradictions, with both values, and for features this tower does not have.
    """

    model_type = "nemotron_vl_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        args: dict[str, Any] | None = None,
        version: str | None = "c-radio_v2-vlm-h",
        patch_size: int | None = 16,
        max_resolution: int | None = 2048,
        preferred_resolution: tuple[int, int] | None = (768, 768),
        adaptor_names: str | list[str] | None = None,
        vitdet_window_size: int | None = None,
        feature_normalizer_config: dict[str, Any] | None = None,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        intermediate_size: int | None = None,
        layer_norm_eps: float = 1e-6,
        num_cls_tokens: int | None = None,
        num_registers: int | None = None,
        summary_idxs: list[int] | None = None,
        use_final_norm: bool | None = None,
        max_image_size: int | None = None,
        external_normalization: bool = False,
        align_corners: bool = True,
        norm_mean: tuple[float, float, float] = CLIP_MEAN,
        norm_std: tuple[float, float, float] = CLIP_STD,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        kwargs.pop("model_type", None)
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_nemotron_vl.RADIOConfig",
            "AutoModel": "radio_model.RADIOModel",
        }
        self.args = dict(args or {})
        self.version = version
        self.patch_size = patch_size or 16
        self.max_resolution = max_resolution or 2048
        self.preferred_resolution = list(preferred_resolution or (768, 768))
        self.adaptor_names = adaptor_names
        self.vitdet_window_size = vitdet_window_size
        self.feature_normalizer_config = feature_normalizer_config
        self.layer_norm_eps = layer_norm_eps
        self.external_normalization = external_normalization
        self.align_corners = align_corners
        self.norm_mean = list(norm_mean)
        self.norm_std = list(norm_std)
        self.initializer_range = initializer_range
        self.use_final_norm = bool(
            _agree(
                "the final norm", (use_final_norm, "use_final_norm"), (self.args.get("model_norm"), "args.model_norm")
            )
        )
        self.max_image_size = _agree(
            "the position table",
            (max_image_size, "max_image_size"),
            (self.args.get("cpe_max_size"), "args.cpe_max_size"),
            default=self.max_resolution,
        )
        _check_dtype("vision_config.", kwargs)
        self._set_sizes(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size)
        self._set_prefix_tokens(num_cls_tokens, num_registers, summary_idxs)
        self._reject_unsupported()
        super().__init__(**kwargs)

    def _set_sizes(
        self,
        hidden_size: int | None,
        num_hidden_layers: int | None,
        num_attention_heads: int | None,
        intermediate_size: int | None,
    ) -> None:
        model_kwargs = self.args.get("model_kwargs") or {}
        model = self.args.get("model") or "vit_huge_patch16_224"
        defaults = VIT_SIZES.get(model, (None, None, None))
        explicit = {
            "hidden_size": (hidden_size, "embed_dim"),
            "num_hidden_layers": (num_hidden_layers, "depth"),
            "num_attention_heads": (num_attention_heads, "num_heads"),
        }
        for (name, (value, timm_name)), default in zip(explicit.items(), defaults, strict=True):
            timm_value = model_kwargs.get(timm_name)
            size = _agree(name, (value, name), (timm_value, f"args.model_kwargs.{timm_name}"), default=default)
            if size is None:
                raise ValueError(
                    f"vision_config.args.model is {model!r}, whose {name} is not known here (known: "
                    f"{', '.join(VIT_SIZES)}). State vision_config.{name}."
                )
            setattr(self, name, size)
        mlp_ratio = model_kwargs.get("mlp_ratio")
        self.intermediate_size = _agree(
            "intermediate_size",
            (intermediate_size, "intermediate_size"),
            (int(mlp_ratio * self.hidden_size) if mlp_ratio is not None else None, "args.model_kwargs.mlp_ratio"),
            default=4 * self.hidden_size,
        )

    def _set_prefix_tokens(
        self, num_cls_tokens: int | None, num_registers: int | None, summary_idxs: list[int] | None
    ) -> None:
        """Count class and register tokens the way C-RADIO derives them from its teachers."""
        teachers = self.args.get("teachers")
        args_cls_tokens, args_summary_idxs = None, None
        if not self.args.get("cls_token_per_teacher", True):
            args_cls_tokens, args_summary_idxs = 1, [0]
        elif teachers:
            names = list(dict.fromkeys(teacher["name"] for teacher in teachers))
            args_cls_tokens = len(names)
            used = dict.fromkeys(teacher["name"] for teacher in teachers if teacher.get("use_summary", True))
            args_summary_idxs = [names.index(name) for name in used]
        self.num_cls_tokens = _agree(
            "num_cls_tokens", (num_cls_tokens, "num_cls_tokens"), (args_cls_tokens, "args.teachers"), default=4
        )
        self.summary_idxs = _agree(
            "summary_idxs",
            (list(summary_idxs) if summary_idxs is not None else None, "summary_idxs"),
            (args_summary_idxs, "args.teachers"),
            default=list(range(min(3, self.num_cls_tokens))),
        )
        args_registers = self.args.get("cpe_num_registers")
        if args_registers is None and (multiple := self.args.get("register_multiple")):
            args_registers = multiple - self.num_cls_tokens % multiple
        self.num_registers = _agree(
            "num_registers", (num_registers, "num_registers"), (args_registers, "args.register_multiple"), default=4
        )

    def _reject_unsupported(self) -> None:
        _check_sizes("vision_config.", vars(self))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}; change one of them."
            )
        if self.max_image_size % self.patch_size:
            raise ValueError(
                f"max_image_size={self.max_image_size} px is not a multiple of patch_size={self.patch_size} px; "
                "the position table holds whole patches."
            )
        if any(not 0 <= index < self.num_cls_tokens for index in self.summary_idxs):
            raise ValueError(
                f"summary_idxs={self.summary_idxs} points outside the {self.num_cls_tokens} class tokens."
            )
        for name in ("adaptor_names", "vitdet_window_size", "feature_normalizer_config"):
            if getattr(self, name):
                raise ValueError(
                    f"vision_config.{name}={getattr(self, name)!r} is not supported by this tower; set it to null, "
                    "or use NVlabs' own code for this checkpoint."
                )

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch: class tokens, then registers."""
        return self.num_cls_tokens + self.num_registers

    @property
    def position_grid_size(self) -> int:
        """Side of the square position table in patches."""
        return self.max_image_size // self.patch_size

    def to_diff_dict(self) -> dict[str, Any]:
        return _published_form(super().to_diff_dict())


class NemotronVLConfig(PretrainedConfig):
    """Configuration of `Llama_Nemotron_Nano_VL`; without arguments, the released 8B V1.

    The class attributes are what the 12B V2 states differently. Published names are the attributes; `text_config` and
    `image_token_id` are aliases of `llm_config` and `img_context_token_id`, readable and settable.

    Args:
        vision_config: `RADIOConfig` or its dict.
        llm_config: `LlamaConfig` or its dict; also accepted as `text_config`.
        force_image_size: side of a tile in pixels.
        patch_size: side of a ViT patch in pixels.
        downsample_ratio: pixel-shuffle scale, one over a whole number; 0.5 merges 2 x 2 patches into one token.
        template: stored only; the prompt comes from the tokenizer's chat template.
        ps_version: pixel-shuffle token order, "v2" row-major or "v1" column-major (transposed).
        image_tag_type: how an image is written into the prompt, "internvl" or "nvlm".
        projector_hidden_size: width between the two layers of the projector `mlp1`.
        vit_hidden_size: width of the tower's features.
        img_context_token_id: id of `<image>`; when a checkpoint directory leaves it out, it is read from the
            tokenizer files beside the config.
        max_sequence_length: context window in tokens, prompt and answer together.
        vision_batch_size: most tiles that run through the tower at once, in forward, generate and chat; bounds the
            memory of many or large images. None runs all at once.

    Raises:
        ValueError: for contradictions, with both values.
    """

    model_type = "Llama_Nemotron_Nano_VL"
    is_composition = True
    sub_configs = {"text_config": LlamaConfig, "vision_config": RADIOConfig}
    language_model_type = "llama"
    # What the released checkpoint has, for a config made without arguments.
    released_llm_config = LLAMA_3_1_8B
    released_image_token_id = 128256
    released_projector_hidden_size = 4096
    released_max_sequence_length = 16384
    attribute_map = {"text_config": "llm_config", "image_token_id": "img_context_token_id"}
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_config: dict[str, Any] | PretrainedConfig | None = None,
        force_image_size: int | None = None,
        patch_size: int | None = None,
        downsample_ratio: float = 0.5,
        template: str | None = None,
        ps_version: str = "v2",
        image_tag_type: str = "internvl",
        projector_hidden_size: int | None = None,
        vit_hidden_size: int | None = None,
        img_context_token_id: int | None = None,
        max_sequence_length: int | None = None,
        vision_batch_size: int | None = None,
        **kwargs: Any,
    ):
        if kwargs.pop("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"This is not a {self.model_type} config; load it with the class of its own architecture."
            )
        _check_dtype("", kwargs)
        # The model class is called like the model type, in the configs that NVIDIA publishes and here.
        kwargs["auto_map"] = {
            "AutoConfig": f"configuration_nemotron_vl.{type(self).__name__}",
            **dict.fromkeys(AUTO_CLASSES, f"modeling_nemotron_vl.{self.model_type}"),
        }
        llm_config = _agree(
            "the language model", (llm_config, "llm_config"), (kwargs.pop("text_config", None), "text_config")
        )
        img_context_token_id = _agree(
            "the image token",
            (img_context_token_id, "img_context_token_id"),
            (kwargs.pop("image_token_id", None), "image_token_id"),
            default=self.released_image_token_id if llm_config is None else None,
        )
        self.llm_config = self._build_llm_config(llm_config)
        self.vision_config = self._build_vision_config(vision_config)
        self.patch_size = _agree(
            "patch_size", (patch_size, "patch_size"), (self.vision_config.patch_size, "vision_config.patch_size")
        )
        self.vit_hidden_size = _agree(
            "the tower's width",
            (vit_hidden_size, "vit_hidden_size"),
            (self.vision_config.hidden_size, "vision_config.hidden_size"),
        )
        self.force_image_size = force_image_size or 512
        self.downsample_ratio = downsample_ratio
        self.template = template
        self.ps_version = ps_version
        self.image_tag_type = image_tag_type
        self.projector_hidden_size = projector_hidden_size or self.released_projector_hidden_size
        self.img_context_token_id = img_context_token_id
        self.max_sequence_length = max_sequence_length or self.released_max_sequence_length
        self.vision_batch_size = vision_batch_size
        self._reject_contradictions()
        kwargs["tie_word_embeddings"] = self.llm_config.tie_word_embeddings
        super().__init__(**kwargs)

    @classmethod
    def _build_llm_config(cls, llm_config: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
        if llm_config is None:
            llm_config = cls.released_llm_config
        if not isinstance(llm_config, (dict, PretrainedConfig)):
            raise TypeError(f"llm_config must be a dict or a config of transformers, got {llm_config!r:.80}.")
        model_type = (
            llm_config.model_type
            if isinstance(llm_config, PretrainedConfig)
            else llm_config.get("model_type", cls.language_model_type)
        )
        if model_type != cls.language_model_type:
            raise ValueError(
                f"{cls.model_type} has a {cls.language_model_type!r} language model, but llm_config.model_type is "
                f"{model_type!r}."
            )
        if isinstance(llm_config, PretrainedConfig):
            return llm_config
        _check_sizes("llm_config.", llm_config)
        _check_dtype("llm_config.", llm_config)
        # Deep copy: transformers standardises the rope dict in place, and this one is the caller's.
        return cls.sub_configs["text_config"](**copy.deepcopy(llm_config))

    @classmethod
    def _build_vision_config(cls, vision_config: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
        if isinstance(vision_config, PretrainedConfig):
            # The dynamic loader makes copies of this file, so isinstance(vision_config, RADIOConfig) says nothing.
            if vision_config.model_type == RADIOConfig.model_type:
                return vision_config
            vision_config = vision_config.to_dict()
        return RADIOConfig(**copy.deepcopy(vision_config or {}))

    def _reject_contradictions(self) -> None:
        _check_sizes("", vars(self))
        if not 0 < self.downsample_ratio <= 1 or (1 / self.downsample_ratio) % 1:
            raise ValueError(
                f"downsample_ratio={self.downsample_ratio} is not one over a whole number; pixel shuffle merges "
                "whole blocks of patches, the released model uses 0.5."
            )
        pixels_per_token = self.patch_size * self.merge_size
        if self.force_image_size % pixels_per_token:
            raise ValueError(
                f"force_image_size={self.force_image_size} px is not a multiple of {pixels_per_token} px "
                f"(patch_size={self.patch_size} / downsample_ratio={self.downsample_ratio})."
            )
        if self.ps_version not in ("v1", "v2"):
            raise ValueError(f"ps_version must be 'v1' or 'v2', got {self.ps_version!r}.")
        if self.image_tag_type not in ("internvl", "nvlm"):
            raise ValueError(f"image_tag_type must be 'internvl' or 'nvlm', got {self.image_tag_type!r}.")
        vocab_size = self.llm_config.vocab_size
        if self.img_context_token_id is not None and not 0 <= self.img_context_token_id < vocab_size:
            raise ValueError(
                f"img_context_token_id={self.img_context_token_id} is outside the vocabulary of "
                f"llm_config.vocab_size={vocab_size}."
            )

    @property
    def merge_size(self) -> int:
        """Side in patches of the block that becomes one visual token."""
        return round(1 / self.downsample_ratio)

    @property
    def num_image_tokens_per_tile(self) -> int:
        """Visual tokens of one tile of `force_image_size`: 256 in the released model."""
        return (self.force_image_size // (self.patch_size * self.merge_size)) ** 2

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, LookupError) as error:  # of an entry that is no dict
            raise ValueError(f"The config.json of {pretrained_model_name_or_path} is damaged: {error}.") from error
        if not isinstance(config_dict, dict):
            raise ValueError(f"The config.json of {pretrained_model_name_or_path} holds no dict.")
        names = ("img_context_token_id", "image_context_token_id", "image_token_id")
        if config_dict and all(config_dict.get(name) is None for name in names):
            config_dict["img_context_token_id"] = read_image_token_id(pretrained_model_name_or_path, **hub_kwargs)
        if config_dict and config_dict.get("quantization_config") is None:
            config_dict = _with_quantization_config(config_dict, pretrained_model_name_or_path, **hub_kwargs)
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "NemotronVLConfig":
        # Published files ask for flash_attention_2, which most machines lack. What runs is the caller's choice.
        config_dict = {key: value for key, value in config_dict.items() if key != "attn_implementation"}
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        # AutoModel.from_config(vision_config), which vLLM calls, looks for our code there.
        config.vision_config.name_or_path = config.name_or_path
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict, which also names the language model's part as PEFT and others look for it."""
        described = super().to_dict()
        described["text_config"] = described["llm_config"]  # one dict: a change under one name holds for both
        return described

    def to_diff_dict(self) -> dict[str, Any]:
        published = _published_form(super().to_diff_dict())
        published.pop("text_config", None)  # once, under its published name
        generic = PretrainedConfig().to_dict()
        for name in ("llm_config", "vision_config"):
            part = _published_form(published[name])
            if name == "llm_config":
                part = self._published_llm_config(part)
            # transformers 5 writes the defaults that every config has; _name_or_path is a path of this machine.
            noise = {key for key in GENERIC_KEYS if key in part and part[key] == generic.get(key)} | {"_name_or_path"}
            published[name] = {key: value for key, value in part.items() if key not in noise}
        if self.vision_batch_size is None:  # a setting of ours; other runtimes need not see it
            published.pop("vision_batch_size", None)
        published["llm_config"].pop("auto_map", None)  # only transformers' own language models are ever built
        return published

    def _published_llm_config(self, llm_config: dict[str, Any]) -> dict[str, Any]:
        """Return the saved form of the language model's config under the published keys."""
        return llm_config


class NemotronVLV2Config(NemotronVLConfig):
    """Configuration of `NemotronH_Nano_VL_V2`; without arguments, the released 12B V2.

    What differs from the 8B V1: the language model is a hybrid of Mamba2, MLP and attention layers, tiles come
    normalised from the image processor, and the config also names the tokens, the statistics of that normalisation and
    what other runtimes need for video. The early name `image_context_token_id` is read as `img_context_token_id`.

    Args:
        use_thumbnail: as the image processor; for other runtimes.
        norm_mean, norm_std: RGB statistics, for pixels in 0..1, that the tiles are normalised with.
        img_context_token, video_context_token, img_start_token, img_end_token: the tokens as text.
        video_context_token_id: id of the video token; kept for other runtimes.
        video_pruning_rate: share of video tokens to drop; kept for other runtimes.
        kwargs: as for `NemotronVLConfig`.

    Raises:
        ImportError: on transformers without NemotronH.
        ValueError: for contradictions, and for the mixture-of-experts siblings that share the architecture's name.
    """

    model_type = "NemotronH_Nano_VL_V2"
    sub_configs = {"text_config": NemotronHConfig or PretrainedConfig, "vision_config": RADIOConfig}
    language_model_type = "nemotron_h"
    released_llm_config = NEMOTRON_NANO_12B_V2
    released_image_token_id = 131072
    released_projector_hidden_size = 20480
    released_max_sequence_length = 131072

    def __init__(
        self,
        use_thumbnail: bool = True,
        norm_mean: tuple[float, float, float] | None = None,
        norm_std: tuple[float, float, float] | None = None,
        img_context_token: str = IMAGE_TOKEN,
        video_context_token: str = "<video>",
        img_start_token: str = "<img>",
        img_end_token: str = "</img>",
        video_context_token_id: int | None = None,
        video_pruning_rate: float = 0.0,
        **kwargs: Any,
    ):
        self.use_thumbnail = use_thumbnail
        self.norm_mean = list(norm_mean or CLIP_MEAN)
        self.norm_std = list(norm_std or CLIP_STD)
        self.img_context_token = img_context_token
        self.video_context_token = video_context_token
        self.img_start_token = img_start_token
        self.img_end_token = img_end_token
        self.video_context_token_id = video_context_token_id
        self.video_pruning_rate = video_pruning_rate
        kwargs["img_context_token_id"] = _agree(
            "the image token",
            (kwargs.get("img_context_token_id"), "img_context_token_id"),
            (kwargs.pop("image_context_token_id", None), "image_context_token_id"),
        )
        super().__init__(**kwargs)

    @classmethod
    def _build_llm_config(cls, llm_config: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
        if NemotronHConfig is None:
            raise ImportError(NEEDED_FOR_V2.format(version=transformers_version))
        if isinstance(llm_config, dict):
            cls._check_layer_pattern(llm_config)
        return super()._build_llm_config(llm_config)

    @staticmethod
    def _check_layer_pattern(llm_config: dict[str, Any]) -> None:
        pattern = llm_config.get("hybrid_override_pattern")
        if pattern is None:
            return
        if not isinstance(pattern, str) or set(pattern) - set("M*-E") or not pattern:
            raise ValueError(
                f"llm_config.hybrid_override_pattern must write the layers with M (Mamba), * (attention) and - (MLP), got "
                f"{pattern!r:.80}."
            )
        if "E" in pattern:
            raise ValueError(MIXTURE_OF_EXPERTS)
        _agree(
            "the number of layers",
            (len(pattern), "the length of llm_config.hybrid_override_pattern"),
            (llm_config.get("num_hidden_layers"), "llm_config.num_hidden_layers"),
        )

    @classmethod
    def _build_vision_config(cls, vision_config: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
        if vision_config is None:
            vision_config = {"num_registers": 12}  # 16 prefix tokens
        config = super()._build_vision_config(vision_config)
        if not config.external_normalization:
            config = copy.deepcopy(config)  # the caller's
            config.external_normalization = True
        return config

    def _published_llm_config(self, llm_config: dict[str, Any]) -> dict[str, Any]:
        published = {name: value for name, value in llm_config.items() if name not in NATIVE_NEMOTRON_H_KEYS}
        if published.get("time_step_limit") in ([0.0, math.inf], (0.0, math.inf)):
            del published["time_step_limit"]  # no limit, the default; transformers 5 writes infinity in its own way
        published["hybrid_override_pattern"] = self.llm_config.hybrid_override_pattern
        published["num_hidden_layers"] = self.llm_config.num_hidden_layers
        return published


def _read_json(
    pretrained_model_name_or_path: str | os.PathLike, filename: str, **hub_kwargs: Any
) -> dict[str, Any] | None:
    """Return the content of a JSON file of a checkpoint, None when it has no such file."""
    if os.path.isfile(pretrained_model_name_or_path):
        pretrained_model_name_or_path = os.path.dirname(pretrained_model_name_or_path) or "."
    try:
        # Named through its module: datasets hashes what functions name, and recurses for ever in the helpers of this one.
        path = hub.cached_file(pretrained_model_name_or_path, filename, **hub_kwargs)
    except OSError:  # what cached_file raises for a file that is not there
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _with_quantization_config(
    config_dict: dict[str, Any], pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs: Any
) -> dict[str, Any]:
    """Put at the top level what the language model's config or `hf_quant_config.json` says about quantisation."""
    config_dict = dict(config_dict)
    for name in ("llm_config", "text_config"):
        part = config_dict.get(name)
        if isinstance(part, dict) and part.get("quantization_config") is not None:
            part = dict(part)
            config_dict["quantization_config"] = part.pop("quantization_config")
            config_dict[name] = part
            return config_dict
    described = _read_json(pretrained_model_name_or_path, "hf_quant_config.json", **hub_kwargs)
    if described is not None:
        config_dict["quantization_config"] = modelopt_quantization_config(described)
    return config_dict


def modelopt_quantization_config(described: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the content of modelopt's `hf_quant_config.json` as the block that newer exports put into config.json.

    Engines read both forms of the block; algorithms other than NVFP4 and FP8 keep the form of the file.
    """
    quantization = dict(described.get("quantization") or {})
    quant_algo = quantization.get("quant_algo")
    if quant_algo not in ("NVFP4", "FP8"):
        return {"quant_method": "modelopt", **described}
    group_size = {"group_size": quantization.get("group_size") or 16} if quant_algo == "NVFP4" else {}
    tensors = {"dynamic": False, "num_bits": 4 if quant_algo == "NVFP4" else 8, "type": "float", **group_size}
    block = {
        "config_groups": {
            "group_0": {"input_activations": dict(tensors), "weights": dict(tensors), "targets": ["Linear"]}
        },
        "ignore": list(quantization.get("exclude_modules") or []),
        "quant_algo": quant_algo,
        "producer": described.get("producer"),
        "quant_method": "modelopt",
    }
    if quantization.get("kv_cache_quant_algo") == "FP8":
        block["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return block


def read_image_token_id(pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs: Any) -> int | None:
    """Return the id of `<image>` from the tokenizer files of a checkpoint, None when they do not name it.

    Args:
        pretrained_model_name_or_path: directory or Hub id, as `from_pretrained` takes it.
        hub_kwargs: arguments of `transformers.utils.cached_file` (`subfolder`, `revision`, `cache_dir`, ...).

    Raises:
        ValueError: if one of the files holds no JSON object.
    """
    for filename in ("tokenizer_config.json", "tokenizer.json"):
        tokenizer = _read_json(pretrained_model_name_or_path, filename, **hub_kwargs)
        if tokenizer is None:
            continue
        if not isinstance(tokenizer, dict):
            raise ValueError(f"{filename} must hold a JSON object, got {tokenizer!r:.80}; download it again.")
        decoder = tokenizer.get("added_tokens_decoder", {})
        added = [(token["content"], int(token_id)) for token_id, token in decoder.items()]
        added += [(token["content"], token["id"]) for token in tokenizer.get("added_tokens", [])]
        if IMAGE_TOKEN in dict(added):
            return dict(added)[IMAGE_TOKEN]
    return None


RADIOConfig.register_for_auto_class()
NemotronVLConfig.register_for_auto_class()
NemotronVLV2Config.register_for_auto_class()
