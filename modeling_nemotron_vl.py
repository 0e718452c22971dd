"""Nemotron Nano VL, 8B V1 and 12B V2: images and text to logits, and generation.

tiles -> C-RADIOv2 tower (`vision_model`) -> pixel shuffle -> projector (`mlp1`) -> rows of the prompt's embeddings
-> language model (`language_model`). Module names are the keys of the published checkpoints.

`NemotronVLForConditionalGeneration` has everything that the two models have in common. The two classes at the end of
the file have the names of the published architectures, and what differs.
"""

import contextlib
import copy
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig, LlamaForCausalLM, PretrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_flash_attn_2_available, logging

# transformers 4.57 copies only files that are imported here: some names are imported for that alone.
from .answers import LoopCriteria as LoopCriteria
from .c_compiler import load_library as load_library
from .chat import ChatMixin
from .checkpoint import Checkpoint, StrictPreTrainedModel
from .configuration_nemotron_vl import NemotronVLConfig, NemotronVLV2Config
from .cpu_matmul import has_product as has_product
from .decode_attention import default_attention, mark_thread_as_lasting, owns_graphs, reused_cache
from .image_processing import recipe_of as recipe_of
from .packed_matmul import has_kernel as has_kernel
from .pictures import Document as Document
from .prompts import IMAGE_TOKEN, TOKEN_TYPES, V1_FORMAT, V2_FORMAT, VIDEO_TOKEN
from .quantization_nemotron_vl import prepare_loading
from .radio_model import RADIOModel, RADIOModelOutput
from .torch_int4 import convert as convert
from .triton_kernels import runs_kernels
from .video_processing import NemotronVLVideoProcessor as NemotronVLVideoProcessor

try:
    from transformers import NemotronHForCausalLM, NemotronHModel
except ImportError:  # transformers 4.57, on which the config of the 12B V2 raises an error
    NemotronHForCausalLM = NemotronHModel = None

logger = logging.get_logger(__name__)

# How far outside 0..1 a pixel may lie, because tiles in bfloat16 are rounded.
PIXEL_TOLERANCE = 0.01
# What `generate` of transformers offers and this model cannot do, and what to do instead.
REFUSED_OPTIONS = {
    "token_healing": "it decodes the prompt without its special tokens and encodes it again, which loses images and chat "
    "format. Leave it out",
    "assistant_early_exit": "no released language model was trained to answer from an early layer. Pass an "
    "assistant_model or prompt_lookup_num_tokens",
    "speculation_type": "it needs a draft model that was trained for this one, and there is none. Pass an assistant_model "
    "or prompt_lookup_num_tokens",
}
# What looks at the ids of a prompt, so that its embeddings alone are not enough.
OPTIONS_THAT_READ_IDS = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "guidance_scale")
# Frames that run through the tower at once, unless config.vision_batch_size says otherwise.
VIDEO_BATCH_SIZE = 16
# How Inductor compiles the decode step. Matmuls of one row become Triton kernels that take in their neighbours: a third
# fewer launches for each layer than with cuBLAS. Compiling takes longer.
COMPILE_OPTIONS = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
# How far outside 0..1 the bicubic filter of the 12B V2 can carry a pixel, before the normalisation.
BICUBIC_OVERSHOOT = 0.5


@dataclass
class NemotronVLOutput(CausalLMOutputWithPast):
    """Output of the language model, and the features that replaced the image tokens.

    Args:
        image_hidden_states: `(num_visual_tokens, hidden_size)`, projected features of all images in order; None when
            the call brought no image.
        video_hidden_states: the same of all videos.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


def pixel_shuffle(features: torch.Tensor, merge_size: int) -> torch.Tensor:
    """Trade resolution for channels: each `merge_size` x `merge_size` block of patches becomes one token.

    Channels of a merged token are ordered (row offset, column offset, channel), as the released projector expects.

    Args:
        features: `(num_tiles, grid_height, grid_width, hidden_size)`.
        merge_size: side of a block in patches; `1 / downsample_ratio`, 2 in the released model.

    Returns:
        `(num_tiles, grid_height // merge_size, grid_width // merge_size, hidden_size * merge_size**2)`.

    Raises:
        ValueError: if a side of the grid is not a multiple of `merge_size`.
    """
    num_tiles, grid_height, grid_width, hidden_size = features.shape
    if grid_height % merge_size or grid_width % merge_size:
        raise ValueError(
            f"pixel_shuffle merges {merge_size}x{merge_size} patches, but a tile has {grid_height}x{grid_width} "
            "patches. Use tiles whose sides are multiples of patch_size / downsample_ratio (32 px in the 8B)."
        )
    merged_height, merged_width = grid_height // merge_size, grid_width // merge_size
    blocks = features.reshape(num_tiles, merged_height, merge_size, merged_width, merge_size, hidden_size)
    blocks = blocks.permute(0, 1, 3, 2, 4, 5)  # (num_tiles, rows, columns, row offset, column offset, hidden)
    return blocks.reshape(num_tiles, merged_height, merged_width, merge_size**2 * hidden_size)


def count_kept_tokens(tokens_per_frame: int, num_frames: int, pruning_rate: float) -> int:
    """Return how many tokens of a video are kept at a pruning rate: at least those of one frame.

    The product is that of double precision, cut to a whole number: 100 frames of 256 tokens at 0.9 keep 2,559.
    """
    if pruning_rate <= 0:
        return tokens_per_frame * num_frames
    return max(tokens_per_frame, int(num_frames * tokens_per_frame * (1 - pruning_rate)))


def video_token_mask(features: torch.Tensor, pruning_rate: float) -> torch.Tensor:
    """Choose the tokens of one video that its earlier frames do not already show (EVS, arXiv 2510.14624).

    A token is the more worth keeping, the less it resembles the token at its place in the frame before. All tokens of
    the first frame come first. Equally different tokens are kept in their order.

    Args:
        features: `(num_frames, tokens_per_frame, hidden_size)`, projected frames; further axes of a frame may stay
            unmerged. Computed in their dtype as in other runtimes, although bfloat16 rounds many differences to
            the same value.
        pruning_rate: share of the tokens to leave out, 0 to below 1; see `count_kept_tokens`.

    Returns:
        bool `(num_frames * tokens_per_frame,)`, True for the tokens to keep.
    """
    differences = 1 - nn.functional.cosine_similarity(features[1:], features[:-1], dim=-1)
    first = differences.new_full((1, *features.shape[1:-1]), 255)  # above every difference
    differences = torch.cat([first, differences]).flatten()
    num_kept = count_kept_tokens(differences.numel() // len(features), len(features), pruning_rate)
    order = torch.argsort(differences, descending=True, stable=True)
    mask = torch.zeros_like(differences, dtype=torch.bool)
    mask[order[:num_kept]] = True
    return mask


class ProjectorRMSNorm(nn.Module):
    """RMSNorm with everything, also the multiplication by the weight, in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features_float = features.float()
        scale = torch.rsqrt(features_float.square().mean(-1, keepdim=True) + self.eps)
        return (features_float * scale * self.weight.float()).to(features.dtype)


class SquaredReLU(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(features).square()


class NemotronVLPreTrainedModel(StrictPreTrainedModel):
    """The attributes and methods of the model that transformers needs to load, place and train it."""

    config: NemotronVLConfig
    base_model_prefix = "backbone"  # names no attribute on purpose: 4.57 strips this prefix from the names of weights
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    # The tower derives these indices from its config; some checkpoints store them as well.
    _keys_to_ignore_on_load_unexpected = [r"summary_idxs$"]
    # The config gives the conditioner's numbers to checkpoints that leave them out.
    _keys_to_ignore_on_load_missing = [r"input_conditioner\.norm_(mean|std)$"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> "NemotronVLPreTrainedModel":
        """Load a checkpoint as transformers does, and raise an error if a weight is missing or surplus.

        Args:
            pretrained_model_name_or_path: directory or Hub id in NVIDIA's layout.
            use_flash_attn: an argument of InternVL clients; True selects flash_attention_2 if it is installed.
            args, kwargs: as for `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError, OSError: see `StrictPreTrainedModel.from_pretrained`.
        """
        if kwargs.pop("use_flash_attn", False) and "attn_implementation" not in kwargs:
            if is_flash_attn_2_available():
                kwargs["attn_implementation"] = "flash_attention_2"
            else:
                logger.warning("use_flash_attn=True, but flash-attn is not installed here; attention runs on sdpa.")
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        subfolder = kwargs.get("subfolder")
        if subfolder and kwargs.get("generation_config") is None and os.path.isdir(pretrained_model_name_or_path):
            # transformers reads the generation config of a local directory's root instead of its subfolder's.
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            with contextlib.suppress(OSError):  # there is none
                folder = os.path.join(pretrained_model_name_or_path, subfolder)
                model.generation_config = GenerationConfig.from_pretrained(folder)
        return loaded

    @classmethod
    def _prepare_loading(
        cls, checkpoint: Checkpoint, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[nn.Module], None]]:
        return prepare_loading(checkpoint, kwargs)


class NemotronVLForConditionalGeneration(NemotronVLPreTrainedModel, ChatMixin, GenerationMixin):
    """C-RADIOv2 tower, projector and language model, with the weight names, config keys and `chat()` of NVIDIA's code.

    Args:
        config: a `NemotronVLConfig`, or the subclass that belongs to the model.
    """

    accepts_uint8_tiles = True  # rescaled on the tower's device
    prunes_videos = False

    def __init__(self, config: NemotronVLConfig):
        super().__init__(config)
        self.vision_model = RADIOModel(config.vision_config)
        self.language_model = self._build_language_model(config.text_config)
        # nn.Sequential because the published keys are mlp1.0, mlp1.1 and mlp1.3.
        self.mlp1 = nn.Sequential(
            *self._build_projector(
                config.vit_hidden_size * config.merge_size**2,
                config.projector_hidden_size,
                config.text_config.hidden_size,
            )
        )
        self.loss_type = "ForCausalLM"  # transformers 4.57 guesses it from the class name otherwise
        self.post_init()

    @staticmethod
    def _build_language_model(text_config: PretrainedConfig) -> PreTrainedModel:
        """Return the language model with fresh weights."""
        raise NotImplementedError(
            "NemotronVLForConditionalGeneration is no model by itself; take one of its two members."
        )

    @staticmethod
    def _build_projector(merged_size: int, hidden_size: int, text_size: int) -> list[nn.Module]:
        """Return the modules of `mlp1`, from merged patches to the width of the language model."""
        raise NotImplementedError(
            "NemotronVLForConditionalGeneration is no model by itself; take one of its two members."
        )

    def _pixel_limits(self) -> tuple[float, float, str]:
        """Return the smallest and the largest value of a tile, and what to do about others."""
        raise NotImplementedError(
            "NemotronVLForConditionalGeneration is no model by itself; take one of its two members."
        )

    @property
    def model(self) -> "NemotronVLModel":
        """The model without its head, under the field's usual name."""
        return NemotronVLModel(self)

    @property
    def base_model(self) -> "NemotronVLModel":
        """The model without its head, under transformers' name."""
        return self.model

    @property
    def vision_tower(self) -> RADIOModel:
        """The tower, under the field's usual name."""
        return self.vision_model

    @property
    def multi_modal_projector(self) -> nn.Sequential:
        """The projector, under the field's usual name."""
        return self.mlp1

    @property
    def embeddings(self) -> nn.ModuleDict:
        """The embedding of the tokens, where PEFT's prompt learning looks for it: `embeddings.word_embeddings`."""
        return nn.ModuleDict({"word_embeddings": self.get_input_embeddings()})

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def enable_input_require_grads(self) -> None:
        """Make the inputs of text and vision blocks require gradients, for adapters under gradient checkpointing."""
        super().enable_input_require_grads()
        self.vision_model.enable_input_require_grads()  # transformers 4.57 sees to the text alone

    def disable_input_require_grads(self) -> None:
        super().disable_input_require_grads()
        self.vision_model.disable_input_require_grads()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model.set_decoder(decoder)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_patches: torch.Tensor | Sequence[int] | None = None,
        image_flags: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run tiles through tower, pixel shuffle and projector.

        Args:
            pixel_values: `(num_tiles, 3, height, width)`, RGB in 0..1, sides multiples of 32 px, on any device. The 8B
                V1 also takes uint8 tiles (`do_rescale=False` of the image processor) and rescales them itself.
            num_patches: tiles per image, to split the result by image; None splits it by tile.
            image_flags: `(num_tiles,)` or `(num_tiles, 1)`; tiles whose flag is not 1 are left out.
            kwargs: passed to the tower (`output_hidden_states`, ...).

        Returns:
            `last_hidden_state`: tower features `(num_tiles, num_patches, vit_hidden_size)`; `pooler_output`: tuple
            with one `(num_tokens, hidden_size)` per image, ready to replace its image tokens.

        Raises:
            ValueError: if `num_patches` does not add up to the number of tiles, or the sides of tiles do not fit.
        """
        self._check_images(pixel_values)
        self._check_uint8("pixel_values", pixel_values)
        pixel_values, tiles_per_image = _select_tiles("pixel_values", pixel_values, num_patches, image_flags)
        return self._tile_features(pixel_values, tiles_per_image, self._vision_batch_size(len(pixel_values)), **kwargs)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        num_video_frames: torch.Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run frames through tower, pixel shuffle and projector, 16 at once or as many as `config.vision_batch_size`.

        Args:
            pixel_values_videos: `(num_frames, 3, height, width)`, the frames of all videos, as the processor returns
                them; see `get_image_features`.
            num_video_frames: frames of each video; None takes all as one video.
            kwargs: passed to the tower.

        Returns:
            `last_hidden_state`: tower features `(num_frames, num_patches, vit_hidden_size)`; `pooler_output`: tuple
            with one `(num_tokens, hidden_size)` per video. Nothing is pruned here; see `generate`.

        Raises:
            ValueError: if `num_video_frames` does not add up to the frames, or the sides of frames do not fit.
        """
        frames_per_video = self._frames_per_video(pixel_values_videos, num_video_frames)
        batch_size = min(self._vision_batch_size(VIDEO_BATCH_SIZE), max(len(pixel_values_videos), 1))
        return self._tile_features(pixel_values_videos, frames_per_video, batch_size, **kwargs)

    def _frames_per_video(self, pixel_values_videos: Any, num_video_frames: Any) -> list[int]:
        """Return the frames of each video, checked against their pixels."""
        _check_shape("pixel_values_videos", pixel_values_videos, "(num_frames, 3, height, width)")
        self._check_uint8("pixel_values_videos", pixel_values_videos)
        num_frames = len(pixel_values_videos)
        frames_per_video = [num_frames] if num_video_frames is None else [int(own) for own in num_video_frames]
        if sum(frames_per_video) != num_frames or min(frames_per_video, default=1) < 1:
            raise ValueError(
                f"num_video_frames={frames_per_video} counts {sum(frames_per_video)} frames, but pixel_values_videos "
                f"holds {num_frames}, and every video has at least one. Pass both as one processor call returned them."
            )
        return frames_per_video

    def _check_uint8(self, name: str, tiles: torch.Tensor) -> None:
        if tiles.dtype == torch.uint8 and not self.accepts_uint8_tiles:
            raise ValueError(f"{name} are uint8, but this model takes tiles that its image processor normalised.")

    def _tile_features(
        self, pixel_values: torch.Tensor, tiles_per_image: Sequence[int], batch_size: int, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Run tiles through tower and projector in batches; `tiles_per_image` splits `pooler_output`."""
        if len(pixel_values) == 0:
            return BaseModelOutputWithPooling(pooler_output=())
        batches = pixel_values.split(batch_size)
        towers, projected = zip(*(self._encode_tiles(batch, **kwargs) for batch in batches), strict=True)
        features = _join(projected)
        tokens_per_tile = features.shape[1]
        pooler_output = features.flatten(0, 1).split([tiles * tokens_per_tile for tiles in tiles_per_image])
        return BaseModelOutputWithPooling(
            last_hidden_state=_join([tower.features for tower in towers]),
            pooler_output=pooler_output,
            hidden_states=_join_layers([tower.hidden_states for tower in towers]),
            attentions=_join_layers([tower.attentions for tower in towers]),
        )

    def _video_outputs(self, pixel_values_videos: torch.Tensor, num_video_frames: Any) -> BaseModelOutputWithPooling:
        """Return `pooler_output` of `get_video_features`, without keeping the larger features of the tower."""
        frames_per_video = self._frames_per_video(pixel_values_videos, num_video_frames)
        batches = pixel_values_videos.split(self._vision_batch_size(VIDEO_BATCH_SIZE))
        features = _join([self._encode_tiles(batch)[1] for batch in batches])
        tokens = [frames * features.shape[1] for frames in frames_per_video]
        return BaseModelOutputWithPooling(pooler_output=features.flatten(0, 1).split(tokens))

    def _check_images(self, pixel_values: Any, visual_features: Any = None) -> None:
        """Raise if tiles, or the features given instead of them, have another shape than the model takes."""
        if visual_features is None:
            _check_shape("pixel_values", pixel_values, "(num_tiles, 3, height, width)")
        elif pixel_values is not None:
            raise ValueError("Pass either pixel_values or visual_features, not both.")
        else:
            width = self.config.vit_hidden_size * self.config.merge_size**2
            _check_shape("visual_features", visual_features, "(num_tiles, tokens, width)", width)

    def _vision_batch_size(self, num_tiles: int) -> int:
        size = self.config.vision_batch_size  # may have been set on the config after loading
        if size is None:
            return num_tiles
        if isinstance(size, bool) or operator.index(size) < 1:
            raise ValueError(f"config.vision_batch_size must be a whole number above 0, or None, got {size!r}.")
        return operator.index(size)

    def _encode_tiles(self, pixel_values: torch.Tensor, **kwargs: Any) -> tuple[RADIOModelOutput, torch.Tensor]:
        """Return the tower's output for some tiles and their tokens, `(num_tiles, tokens_per_tile, hidden_size)`."""
        pixel_values = _move(pixel_values, self.vision_model.device)
        if pixel_values.dtype == torch.uint8:  # moved in a quarter of the bytes
            pixel_values = pixel_values * (1 / 255)
        tower = self.vision_model(pixel_values, **kwargs)
        grid_size = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        merged = pixel_shuffle(tower.features.unflatten(1, grid_size), self.config.merge_size)
        if self.config.ps_version == "v1":  # CODEPATH: early InternVL exports, which order the tokens column by column
            merged = merged.transpose(1, 2)
        return tower, self._project(merged.flatten(1, 2))

    def _project(self, merged: torch.Tensor) -> torch.Tensor:
        """Project merged patches, `(num_tiles, tokens, width)`, on the device and in the dtype of the projector."""
        # The first parameter is the weight of the norm, which is never quantised. `mlp1[0].weight` would fail where
        # PEFT's modules_to_save wraps mlp1.
        weight = next(self.mlp1.parameters())
        return self.mlp1(_move(merged, weight.device).to(weight.dtype))

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
        token_id: int | None = None,
        num_placeholders: int | None = None,
    ) -> torch.Tensor:
        """Find the image tokens and check that there is one feature for each.

        Args:
            input_ids: `(batch_size, sequence_length)`; None compares `inputs_embeds` with the token's embedding.
            inputs_embeds: `(batch_size, sequence_length, hidden_size)`.
            image_features: `(num_visual_tokens, hidden_size)`.
            token_id: the token to find; None is the image token.
            num_placeholders: how many image tokens the ids have, if that is known; counting them waits for the device.

        Returns:
            bool `(batch_size, sequence_length, hidden_size)`.

        Raises:
            ValueError: if the two counts differ; the message holds both.
        """
        mask = self._find_tokens(input_ids, inputs_embeds, self._image_token_id() if token_id is None else token_id)
        _check_counts(mask.sum() if num_placeholders is None else num_placeholders, image_features.shape[0])
        return mask.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device)

    def _find_tokens(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_id: int
    ) -> torch.Tensor:
        """Return where a prompt has a token, bool `(batch_size, sequence_length)`."""
        if input_ids is not None:
            return input_ids == token_id
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _find_videos(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        has_images: bool,
        mm_token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return where a prompt with videos has their tokens, bool `(batch_size, sequence_length)`.

        They are the model's video tokens. Where a prompt has none, as those of the 8B V1 and of other runtimes, they are
        image tokens; beside images, `mm_token_type_ids` says which.

        Raises:
            ValueError: if it is needed and does not say it.
        """
        video_token_id = getattr(self.config, "video_context_token_id", None)
        if video_token_id is not None:
            videos = self._find_tokens(input_ids, inputs_embeds, video_token_id)
            if torch.compiler.is_compiling() or has_images or bool(videos.any()):
                return videos
        image_tokens = self._find_tokens(input_ids, inputs_embeds, self._image_token_id())
        if not has_images:
            return image_tokens
        if mm_token_type_ids is None or mm_token_type_ids.shape != image_tokens.shape:
            raise ValueError(
                "This model writes images and videos with the same token, so a prompt with both needs mm_token_type_ids, "
                "of the shape of input_ids, to tell them apart. Pass what the processor returned."
            )
        return image_tokens & (mm_token_type_ids.to(image_tokens.device) == TOKEN_TYPES[VIDEO_TOKEN])

    def _insert_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor | None,
        video_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        num_placeholders: int | None = None,
    ) -> torch.Tensor:
        """Return `inputs_embeds` with the rows of visual tokens replaced by the features of images and videos."""
        if video_features is not None:
            video_features = video_features.to(inputs_embeds.device, inputs_embeds.dtype)
            videos = self._find_videos(input_ids, inputs_embeds, image_features is not None, mm_token_type_ids)
            _check_counts(videos.sum(), video_features.shape[0], "video")
            images = self._find_tokens(input_ids, inputs_embeds, self._image_token_id()) & ~videos
            _check_counts(images.sum(), 0 if image_features is None else image_features.shape[0])
            if image_features is not None:
                image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
                images = images.unsqueeze(-1).to(inputs_embeds.device)
                inputs_embeds = inputs_embeds.masked_scatter(images, image_features)
            return inputs_embeds.masked_scatter(videos.unsqueeze(-1).to(inputs_embeds.device), video_features)
        image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features, num_placeholders=num_placeholders)
        return inputs_embeds.masked_scatter(mask, image_features)

    def _language_model_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        visual: "VisualInputs",
        past_key_values: Any | None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        """Return the inputs of the language model, and the features of images and of videos; see `forward`.

        With images or videos the inputs are the embedded prompt with these in their places. Otherwise they are the
        ids, which the language model embeds by itself.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds to forward.")
        encoded = visual.mm_encoder_outputs or {}
        for name, pixels, kind in (
            ("pixel_values", visual.pixel_values, "image"),
            ("pixel_values_videos", visual.pixel_values_videos, "video"),
        ):
            if pixels is not None and encoded.get(kind) is not None:
                raise ValueError(f"Pass either {name} or mm_encoder_outputs[{kind!r}] to forward, not both.")
        given_ids, input_ids = input_ids, self._beside_embeddings(input_ids)
        image_outputs, video_outputs = encoded.get("image"), encoded.get("video")
        # Under torch.compile the numbers would break the graph; they only split the features by image.
        is_compiling = torch.compiler.is_compiling()
        num_placeholders = None
        if visual.pixel_values is not None:
            num_patches = None
            if not is_compiling:
                num_patches, num_placeholders = _read_numbers(visual.num_patches, self._count_images(given_ids))
            image_outputs = self.get_image_features(
                visual.pixel_values, num_patches, visual.image_flags, return_dict=True
            )
        if visual.pixel_values_videos is not None:
            num_frames = None if is_compiling else visual.num_video_frames
            video_outputs = self._video_outputs(visual.pixel_values_videos, num_frames)
        image_features, video_features = _features_of(image_outputs), _features_of(video_outputs)
        is_blind = image_features is None and video_features is None
        if input_ids is not None and _begins_prompt(input_ids, past_key_values):
            self._check_absent(input_ids, image_features, video_features)
        runs_blank_tile = is_blind and past_key_values is None and self._trains_in_processes
        if inputs_embeds is None:
            if is_blind and not self._is_on_several_devices and not runs_blank_tile:
                return {"input_ids": input_ids}, None, None
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if not is_blind:
            inputs_embeds = self._insert_images(
                input_ids, inputs_embeds, image_features, video_features, visual.mm_token_type_ids, num_placeholders
            )
        elif runs_blank_tile:
            side = self.config.patch_size * self.config.merge_size
            blank = torch.zeros(1, 3, side, side, device=self.vision_model.device)
            features = self.get_image_features(blank, return_dict=True).pooler_output[0]
            inputs_embeds = inputs_embeds + (0 * features).sum().to(inputs_embeds.device, inputs_embeds.dtype)
        return {"inputs_embeds": inputs_embeds}, image_features, video_features

    @property
    def _trains_in_processes(self) -> bool:
        """Whether other processes train along, so that tower and projector must run even for a batch without images.

        DDP waits for the gradient of every weight, and FSDP gathers a block's weights in all processes at once. The
        smallest tile, of one token, is enough for both.
        """
        distributed = torch.distributed
        return (
            self.training
            and distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        )

    @property
    def _is_on_several_devices(self) -> bool:
        """Whether a device map places the model on several devices."""
        device_map = vars(self).get("hf_device_map")
        return device_map is not None and len(set(device_map.values())) > 1

    def _beside_embeddings(self, tensor: Any, inputs_embeds: torch.Tensor | None = None) -> Any:
        """Move ids or a mask, if it is a tensor, to the device of embedded inputs, or of the embeddings' weights.

        accelerate's hooks may bring embedded inputs to another device than that of the weights.
        """
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return _move(tensor, (self.get_input_embeddings().weight if inputs_embeds is None else inputs_embeds).device)

    def _count_visual(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Count the image tokens of ids and, for a model that has them, the video tokens, on their device."""
        if input_ids is None:
            return None
        video_token_id = getattr(self.config, "video_context_token_id", None)
        token_ids = [self._image_token_id(), *([] if video_token_id is None else [video_token_id])]
        return torch.stack([(input_ids == token_id).sum() for token_id in token_ids])

    def _count_images(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Count the image tokens of ids, on their device."""
        return None if input_ids is None else (input_ids == self._image_token_id()).sum()

    def _check_absent(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
    ) -> None:
        """Raise if a prompt without images has image tokens, or one without videos has video tokens."""
        # CODEPATH: a config made by hand may lack the image token; a text-only prompt does not need it.
        if image_features is None and video_features is None and self.config.image_token_id is not None:
            _check_counts((input_ids == self.config.image_token_id).sum(), 0)
        video_token_id = getattr(self.config, "video_context_token_id", None)
        if video_features is None and video_token_id is not None:
            _check_counts((input_ids == video_token_id).sum(), 0, "video")

    def _are_visual(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return which tokens stand for images or videos."""
        is_visual = input_ids == self.config.image_token_id
        video_token_id = getattr(self.config, "video_context_token_id", None)
        return is_visual if video_token_id is None else is_visual | (input_ids == video_token_id)

    def _image_token_id(self) -> int:
        if self.config.image_token_id is None:
            raise ValueError(
                "config.img_context_token_id is not set, so the image tokens of a prompt cannot be found. Set it to the "
                "id of <image>: model.config.img_context_token_id = tokenizer.convert_tokens_to_ids('<image>')."
            )
        return self.config.image_token_id

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_patches: torch.Tensor | Sequence[int] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        num_video_frames: torch.Tensor | Sequence[int] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NemotronVLOutput:
        """Compute logits, and with labels the loss.

        Args:
            input_ids: `(batch_size, sequence_length)`; one image token per visual token of `pixel_values`.
            pixel_values: `(num_tiles, 3, height, width)`, RGB in 0..1, all tiles of the batch in prompt order.
            attention_mask: `(batch_size, sequence_length)`, 1 for tokens, 0 for padding.
            position_ids: `(batch_size, sequence_length)`.
            image_flags: `(num_tiles,)` or `(num_tiles, 1)`; tiles whose flag is not 1 are left out.
            past_key_values: cache of earlier tokens. With a filled cache and without pixels, image tokens are taken
                as text.
            inputs_embeds: `(batch_size, sequence_length, hidden_size)` instead of `input_ids`.
            labels: `(batch_size, sequence_length)`, -100 where no loss is wanted; shifted inside. Image tokens, and the
                token before and after each run of them that is attended (`<img>` and `</img>`), never carry loss,
                whatever stands here; video tokens likewise. With `logits_to_keep` as many as there are logits.
            use_cache: return the cache.
            num_patches: tiles per image, as the processor returns it.
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`, and
                `{"video": get_video_features(...)}` instead of `pixel_values_videos`.
            mm_token_type_ids: `(batch_size, sequence_length)`, 1 at images and 2 at videos, as the processor returns
                it. Only the 8B V1 needs it, and only for a prompt with images and videos.
            pixel_values_videos: `(num_frames, 3, height, width)`, the frames of all videos of the batch in prompt
                order. No token is pruned here; `generate` does that.
            num_video_frames: frames of each video, as the processor returns it.
            logits_to_keep: how many last positions get logits, 0 for all; or the positions.
            kwargs: for the language model; `return_dict=False` asks for a tuple, None leaves it to the config.

        Raises:
            ValueError: if image tokens and features differ in number, or inputs exclude each other.
        """
        visual = VisualInputs(
            *(pixel_values, num_patches, image_flags, pixel_values_videos, num_video_frames),
            *(mm_encoder_outputs, mm_token_type_ids),
        )
        prompt, image_features, video_features = self._language_model_inputs(
            input_ids, inputs_embeds, visual, past_key_values
        )
        # generate makes positions beside the ids; a device map may have put the embeddings elsewhere.
        attention_mask, position_ids = (
            self._beside_embeddings(tensor, prompt.get("inputs_embeds")) for tensor in (attention_mask, position_ids)
        )
        outputs = self.language_model(
            **prompt,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            if image_features is not None or video_features is not None or input_ids is None:
                labels = self._without_images(labels, input_ids, attention_mask, kwargs.get("ignore_index", -100))
            loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return NemotronVLOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            video_hidden_states=video_features,
        )

    def _without_images(
        self,
        labels: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        ignore_index: int,
    ) -> torch.Tensor:
        """Return the labels with `ignore_index` at the image tokens and at the tokens around each run of them."""
        # CODEPATH: a config made by hand may lack the image token; a text-only prompt does not need it.
        if self.config.image_token_id is None:
            return labels
        # Embeddings name no tokens, and labels cut to the kept logits are not beside theirs; there the labels do.
        are_beside = input_ids is not None and input_ids.shape == labels.shape
        is_image = self._are_visual(input_ids.to(labels.device) if are_beside else labels)
        shown = is_image
        if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == is_image.shape:
            shown = is_image & attention_mask.to(is_image.device, torch.bool)  # a masked tile has text beside it
        shown = nn.functional.pad(shown, (1, 1))
        return labels.masked_fill(is_image | shown[:, 2:] | shown[:, :-2] | self._are_visual(labels), ignore_index)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        num_patches: torch.Tensor | Sequence[int] | None = None,
        image_flags: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        num_video_frames: torch.Tensor | Sequence[int] | None = None,
        video_pruning_rate: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does: the result holds the prompt and the new tokens.

        The result begins with `input_ids` as they were given, also where tokens of videos were pruned. So
        `output[:, input_ids.shape[1]:]` are the new tokens in every case. A streamer, stopping criteria and
        `max_length` see the pruned prompt.

        Args:
            inputs: `(batch_size, sequence_length)` prompt ids, also accepted as `input_ids`.
            generation_config: a `GenerationConfig`; its fields may also be given by name.
            args: further positional arguments of `GenerationMixin.generate`.
            pixel_values, num_patches, image_flags: as for `get_image_features`; the tiles run through the tower once.
            visual_features: `(num_tiles, tokens, vit_hidden_size * merge_size**2)`, features after pixel shuffle,
                instead of `pixel_values`; only the projector is applied.
            pixel_values_videos, num_video_frames: as for `get_video_features`. Without `num_video_frames`, each row of
                the batch has at most one video.
            video_pruning_rate: share of the tokens of each video to leave out, 0 to below 1, for the 12B V2 (see
                `video_token_mask`); None is the attribute of this name, by default the config's. The tokens are removed
                from embeddings, ids and attention mask of the prompt; labels and tags of frames stay.
            kwargs: everything that `GenerationMixin.generate` takes, except `REFUSED_OPTIONS`. `inputs_embeds` beside the
                ids they were made of are the prompt; images are put in where they are given. Beside a cache, images
                are those of the uncached ids, or of all ids. On CUDA, a generation that names no cache gets a static
                cache and a compiled decode step; compiling takes a while in the first call. `disable_compile=True`
                keeps the dynamic cache. So does everything for which a static cache does not work (see
                `_wants_static_cache`).

        Raises:
            ValueError: if image tokens and features differ in number, pixels lie outside 0..1, the prompt does not
                fit the context, or an option cannot be had; the message says why.
        """
        given_ids, inputs = inputs if inputs is not None else kwargs.get("input_ids"), self._beside_embeddings(inputs)
        beside = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
        kwargs |= {name: self._beside_embeddings(kwargs[name]) for name in beside if name in kwargs}
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        inputs_embeds = kwargs.get("inputs_embeds")
        num_placeholders = None
        # transformers lets ids of another length be a mere record of what the embeddings stand for.
        embeds_alone = inputs_embeds is not None and (
            input_ids is None or input_ids.shape[:2] != inputs_embeds.shape[:2]
        )
        visual = VisualInputs(
            *(pixel_values, num_patches, image_flags, pixel_values_videos, num_video_frames),
            *(kwargs.pop("mm_encoder_outputs", None) or {}, kwargs.get("mm_token_type_ids")),
        )
        prompt_embeds = kwargs.get("prompt_embeds")
        images = {
            "pixel_values": pixel_values,
            "visual_features": visual_features,
            "mm_encoder_outputs": visual.mm_encoder_outputs.get("image"),
            "prompt_embeds": prompt_embeds,
        }
        videos = {
            "pixel_values_videos": pixel_values_videos,
            "mm_encoder_outputs": visual.mm_encoder_outputs.get("video"),
            "prompt_embeds": prompt_embeds,
        }
        self._check_generation(self._given_option(generation_config, kwargs), images, videos, embeds_alone)
        has_images = prompt_embeds is None and any(value is not None for value in images.values())
        plan = self._plan_videos(None if embeds_alone else input_ids, visual, video_pruning_rate, has_images, kwargs)
        if input_ids is not None:  # before the tower runs
            self._tokens_left_after(input_ids.shape[1] if plan is None else plan.prompt_length, plan)
        if visual_features is not None:
            self._check_images(None, visual_features)
            features, _ = _select_tiles("visual_features", visual_features, num_patches, image_flags)
            projected = BaseModelOutputWithPooling(pooler_output=tuple(self._project(features)))
            visual = visual._replace(mm_encoder_outputs={**visual.mm_encoder_outputs, "image": projected})
        elif pixel_values is not None:
            num_patches, counts, extremes = _read_numbers(
                num_patches, None if embeds_alone else self._count_visual(given_ids), _extremes(pixel_values)
            )
            num_placeholders = None if counts is None else counts[0]
            if counts is not None and pixel_values_videos is None and visual.mm_encoder_outputs.get("video") is None:
                _check_counts(sum(counts[1:]), 0, "video")
            _check_pixel_range("pixel_values", extremes, *self._pixel_limits())
            visual = visual._replace(num_patches=num_patches)
        outputs = self._encode_media(visual, plan)
        if outputs and self._has_virtual_tokens and not embeds_alone:
            kwargs["mm_encoder_outputs"] = outputs
        else:
            self._embed_media(input_ids, outputs, embeds_alone, kwargs, num_placeholders)
        prompt = inputs_embeds if embeds_alone else input_ids
        if plan is None or not plan.prunes:
            return self._generate_with_cache(inputs, generation_config, args, kwargs, prompt)
        pruned_ids = self._prune(plan, input_ids, outputs["video"], kwargs)
        if inputs is None:
            kwargs["input_ids"] = pruned_ids
        pruned_inputs = None if inputs is None else pruned_ids
        output = self._generate_with_cache(pruned_inputs, generation_config, args, kwargs, pruned_ids)
        return _with_prompt(output, input_ids, pruned_ids.shape[1])

    def _generate_with_cache(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        prompt: torch.Tensor | None,
    ) -> Any:
        """Call `generate` of transformers, with a static cache and a compiled decode step where these are wanted.

        `prompt` is what the cache has to hold, `(batch_size, sequence_length, ...)`.
        """
        if args or not self._wants_static_cache(generation_config, kwargs):
            return super().generate(inputs, generation_config, *args, **kwargs)
        if self._given_option(generation_config, kwargs)("compile_config") is None:
            compile_config = CompileConfig(mode=None, options=dict(COMPILE_OPTIONS))
            if generation_config is None:
                kwargs["compile_config"] = compile_config
            else:
                generation_config = copy.copy(generation_config)
                generation_config.compile_config = compile_config
        if hasattr(self, "_get_cache"):  # transformers 4.57, which keeps a static cache by itself
            return super().generate(inputs, generation_config, **{**kwargs, "cache_implementation": "static"})
        with self._static_cache(generation_config, kwargs, prompt) as cache:
            return super().generate(inputs, generation_config, **{**kwargs, "past_key_values": cache})

    def _static_cache(
        self, generation_config: GenerationConfig | None, kwargs: Mapping[str, Any], prompt: torch.Tensor | None
    ) -> contextlib.AbstractContextManager[Any]:
        """Return a static cache for the answers to a prompt, `(batch_size, sequence_length, ...)`."""
        given = self._given_option(generation_config, kwargs)
        window = self.config.max_sequence_length
        batch_size, length = (1, 1) if prompt is None else prompt.shape[:2]
        num_tokens = window if given("max_new_tokens") is None else length + given("max_new_tokens")
        keep = not given("return_dict_in_generate")
        return reused_cache(self, batch_size * (given("num_return_sequences") or 1), num_tokens, window, keep)

    def _encode_media(self, visual: "VisualInputs", plan: "VideoPlan | None") -> dict[str, BaseModelOutputWithPooling]:
        """Return the features of the images and of the videos of a prompt, those that there are."""
        outputs = {kind: output for kind, output in visual.mm_encoder_outputs.items() if output is not None}
        if visual.pixel_values is not None:
            outputs["image"] = self.get_image_features(
                visual.pixel_values, visual.num_patches, visual.image_flags, return_dict=True
            )
        if visual.pixel_values_videos is not None:
            (extremes,) = _read_numbers(_extremes(visual.pixel_values_videos))
            _check_pixel_range("pixel_values_videos", extremes, *self._pixel_limits())
            num_frames = visual.num_video_frames if plan is None else plan.frames_per_video
            outputs["video"] = self._video_outputs(visual.pixel_values_videos, num_frames)
        return outputs

    def _embed_media(
        self,
        input_ids: torch.Tensor | None,
        outputs: Mapping[str, BaseModelOutputWithPooling],
        embeds_alone: bool,
        kwargs: dict[str, Any],
        num_placeholders: int | None,
    ) -> None:
        """Put the embeddings of a prompt with images and videos into the arguments of `generate`."""
        image_features, video_features = _features_of(outputs.get("image")), _features_of(outputs.get("video"))
        types = kwargs.get("mm_token_type_ids")
        if embeds_alone:
            if image_features is not None or video_features is not None:
                kwargs["inputs_embeds"] = self._insert_images(
                    None, kwargs["inputs_embeds"], image_features, video_features, types
                )
        elif input_ids is not None and kwargs.get("prompt_embeds") is None:
            inputs_embeds = kwargs.pop("inputs_embeds", None)
            kwargs["prompt_embeds"] = self._embed_prompt(
                input_ids,
                image_features,
                kwargs.get("past_key_values"),
                inputs_embeds,
                video_features,
                types,
                num_placeholders,
            )

    @property
    def video_pruning_rate(self) -> float:
        """Share of a video's tokens that `generate` leaves out: the config's, unless it was set here.

        Raises:
            ValueError: when it is set to a rate that the model cannot have.
        """
        own = vars(self).get("_own_pruning_rate")
        rate = getattr(self.config, "video_pruning_rate", None) if own is None else own
        return 0.0 if rate is None else rate

    @video_pruning_rate.setter
    def video_pruning_rate(self, rate: float) -> None:
        self._own_pruning_rate = self._check_pruning_rate(rate)

    def count_pruned_tokens(
        self, num_video_frames: torch.Tensor | Sequence[int], video_pruning_rate: float | None = None
    ) -> int:
        """Return how many tokens `generate` leaves out of prompts with videos of these numbers of frames.

        Args:
            num_video_frames: frames of each video, as the processor returns it.
            video_pruning_rate: as for `generate`.
        """
        rate = self._check_pruning_rate(self.video_pruning_rate if video_pruning_rate is None else video_pruning_rate)
        tokens = self.config.num_image_tokens_per_tile
        frames = [int(own) for own in num_video_frames]
        return sum(tokens * own - count_kept_tokens(tokens, own, rate) for own in frames)

    def _check_pruning_rate(self, rate: Any) -> float:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"video_pruning_rate must be a number from 0 to below 1, got {rate!r}.")
        if rate and not self.prunes_videos:
            raise ValueError(
                f"video_pruning_rate={rate} cannot be had: the 8B V1 was not trained on pruned videos. Use 0, or take "
                "fewer frames."
            )
        return float(rate)

    def _plan_videos(
        self,
        input_ids: torch.Tensor | None,
        visual: "VisualInputs",
        pruning_rate: float | None,
        has_images: bool,
        kwargs: Mapping[str, Any],
    ) -> "VideoPlan | None":
        """Find the videos of a prompt, and say how many tokens of each are kept, before the tower runs.

        Returns:
            None if there is no video, or no ids name its tokens.

        Raises:
            ValueError: if frames and video tokens differ in number, or pruning is not possible.
        """
        rate = None if pruning_rate is None else self._check_pruning_rate(pruning_rate)
        outputs = visual.mm_encoder_outputs.get("video")
        if visual.pixel_values_videos is not None:
            frames = self._frames_per_video(visual.pixel_values_videos, visual.num_video_frames)
            tokens_per_frame = self._tokens_per_tile(visual.pixel_values_videos, None)
        elif outputs is not None:
            tokens_per_frame = self.config.num_image_tokens_per_tile
            frames = [len(features) // tokens_per_frame for features in outputs.pooler_output]
        else:
            return None
        rate = self._check_pruning_rate(self.video_pruning_rate) if rate is None else rate
        unpruned = {
            "a prompt of inputs_embeds alone": input_ids is None,
            "prompt_embeds": kwargs.get("prompt_embeds") is not None,
            "PEFT's virtual tokens": self._has_virtual_tokens,
            "a cache that already holds tokens": _num_cached(kwargs.get("past_key_values")) > 0,
        }
        obstacles = [name for name, is_there in unpruned.items() if is_there]
        if obstacles:
            if rate:
                raise ValueError(f"Videos cannot be pruned with {obstacles[0]}. Pass video_pruning_rate=0.")
            return None
        videos = self._find_videos(input_ids, None, has_images, visual.mm_token_type_ids)
        tokens_of_rows = videos.sum(1).tolist()
        _check_counts(videos.sum(), sum(frames) * tokens_per_frame, "video")
        if visual.num_video_frames is None and outputs is None:  # one video a row
            frames = [-(-tokens // tokens_per_frame) for tokens in tokens_of_rows if tokens]
        kept = [count_kept_tokens(tokens_per_frame, own, rate) for own in frames]
        mask = kwargs.get("attention_mask")
        attended = torch.ones_like(videos) if mask is None else mask.to(videos.device).cumsum(1) > 0
        dropped = _dropped_of_rows(frames, kept, tokens_per_frame, tokens_of_rows)
        lengths = [length - own for length, own in zip(attended.sum(1).tolist(), dropped, strict=True)]
        if sum(kept) == sum(frames) * tokens_per_frame:
            return VideoPlan(frames, tokens_per_frame, 0.0, kept, videos, attended, input_ids.shape[1])
        if mask is None and len(input_ids) > 1:
            raise ValueError("A batch with pruned videos needs its attention_mask. Pass what the processor returned.")
        return VideoPlan(frames, tokens_per_frame, rate, kept, videos, attended, max(lengths))

    def _prune(
        self,
        plan: "VideoPlan",
        input_ids: torch.Tensor,
        video_outputs: BaseModelOutputWithPooling,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return the ids of a prompt without the pruned tokens of its videos, and shorten embeddings and mask likewise.

        Args:
            plan: of this prompt.
            input_ids: of the whole prompt.
            video_outputs: the features of each video.
            kwargs: those of `generate`; `prompt_embeds` and `attention_mask` are replaced, and what else has a value for
                each token is removed, because the 12B V2 does not use it.
        """
        masks = [
            video_token_mask(features.unflatten(0, (-1, plan.tokens_per_frame)), plan.pruning_rate)
            for features in video_outputs.pooler_output
        ]
        kept = plan.attended.clone()
        kept[plan.videos] &= torch.cat(masks).to(kept.device)
        embeds = kwargs["prompt_embeds"]
        shape = (len(input_ids), plan.prompt_length)
        # Rows end together, as they did before: what is left of a shorter one is padding.
        places = torch.arange(plan.prompt_length, device=kept.device) >= plan.prompt_length - kept.sum(1, keepdim=True)
        pruned_ids = input_ids.new_zeros(shape)
        pruned_ids[places.to(input_ids.device)] = input_ids[kept.to(input_ids.device)]
        pruned_embeds = embeds.new_zeros(*shape, embeds.shape[-1])
        pruned_embeds[places.to(embeds.device)] = embeds[kept.to(embeds.device)]
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        pruned_mask = mask.new_zeros(shape)
        pruned_mask[places.to(mask.device)] = mask[kept.to(mask.device)]
        kwargs |= {"prompt_embeds": pruned_embeds, "attention_mask": pruned_mask}
        for name in ("mm_token_type_ids", "position_ids"):
            kwargs.pop(name, None)
        return pruned_ids

    def _given_option(
        self, generation_config: GenerationConfig | None, kwargs: Mapping[str, Any]
    ) -> Callable[[str], Any]:
        """Return a function from the name of an option to its value in the call, else in a config; None if not given."""
        configs = (generation_config, self.generation_config)
        sources = (kwargs, *(vars(config) for config in configs if config is not None))
        return lambda name: next((source[name] for source in sources if source.get(name) is not None), None)

    @staticmethod
    def _check_generation(
        given: Callable[[str], Any], images: Mapping[str, Any], videos: Mapping[str, Any], embeds_alone: bool
    ) -> None:
        """Raise for options that this model, or a prompt of this kind, cannot have.

        Args:
            given: see `_given_option`.
            images, videos: the arguments that bring images or videos, None for those that are absent.
            embeds_alone: whether the prompt is `inputs_embeds` without ids.

        Raises:
            ValueError: naming the option, the reason and what to do.
        """
        for name, reason in REFUSED_OPTIONS.items():
            if given(name) is not None and given(name) is not False:
                raise ValueError(f"generate does not support {name}={given(name)!r}: {reason}.")
        for sources in (images, videos):
            brought = [name for name, value in sources.items() if value is not None]
            if len(brought) > 1:
                raise ValueError(f"Pass either {' or '.join(brought)} to generate, not both.")
        if (
            any(value is not None for value in (*images.values(), *videos.values()))
            and given("cache_implementation") == "paged"
        ):
            raise ValueError(
                "generate does not support cache_implementation='paged' for a prompt with images: continuous batching "
                "takes ids alone. Leave it out, or serve the model with vLLM (docs/serving.md)."
            )
        unread = [name for name in OPTIONS_THAT_READ_IDS if given(name) is not None]
        if embeds_alone and unread:
            raise ValueError(
                f"{', '.join(unread)} reads the ids of the prompt, but generate got inputs_embeds without them. Pass "
                "the input_ids, one for each embedding, beside them."
            )

    def _wants_static_cache(self, generation_config: GenerationConfig | None, kwargs: Mapping[str, Any]) -> bool:
        """Say whether a generation names no cache, and transformers can compile it with a static one.

        It cannot if there are beams, an assistant, a kept cache, no cache or a chunked prefill, if the model is on
        several devices, or if it has a state that transformers does not make static. Only one thread gets a static
        cache, because CUDA graphs belong to a thread: the first of the main one, that of `chat_stream` and those that
        called `compile_in_this_thread`.
        """
        given = self._given_option(generation_config, kwargs)
        others = ("cache_implementation", "past_key_values", "assistant_model", "prompt_lookup_num_tokens")
        return (
            not self._is_on_several_devices
            and not self._is_stateful
            and not self._has_virtual_tokens
            and given("use_cache") is not False
            and not given("disable_compile")
            and (given("num_beams") or 1) == 1
            and all(given(name) is None for name in (*others, "prefill_chunk_size", "custom_generate"))
            and runs_kernels(self.device)  # torch.compile makes Triton kernels
            and owns_graphs(self)  # the last: from now on it does
        )

    def compile_in_this_thread(self) -> None:
        """Give the static cache and the compiled step on CUDA to the generations of the calling thread alone.

        For a server that generates in one thread, which has to live as long as the model. Without it, they belong to
        the main thread or to that of `chat_stream`, whichever generates first.

        Raises:
            RuntimeError: if they belong to another thread already.
        """
        mark_thread_as_lasting()
        if not owns_graphs(self):
            raise RuntimeError(
                "Another thread has generated with this model, and a CUDA graph belongs to the thread that recorded it. "
                "Call compile_in_this_thread() before the first generation, and generate in that thread alone."
            )

    def _embed_prompt(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None,
        past_key_values: Any | None,
        inputs_embeds: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        num_placeholders: int | None = None,
    ) -> torch.Tensor | None:
        """Embed a prompt with its images and videos; None if its ids are enough.

        The result is `(batch_size, sequence_length, hidden_size)`.

        `inputs_embeds` are embeddings that the caller made of the ids; without features they stand for the prompt.
        `num_placeholders` is how many image tokens the ids have, if that is known.
        """
        num_cached = _num_cached(past_key_values)  # images in the cache are not given again
        if num_cached and num_cached >= input_ids.shape[1]:
            raise ValueError(
                f"past_key_values holds {num_cached} positions, but input_ids has {input_ids.shape[1]} tokens. Pass "
                "all ids of the conversation, the cached ones in front, and at least one new one."
            )
        features = [own for own in (image_features, video_features) if own is not None]
        if inputs_embeds is None:
            if num_placeholders is None:  # otherwise both kinds of tokens have been counted
                self._check_absent(input_ids[:, num_cached:], image_features, video_features)
            if not features:
                return None
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if not features:
            return inputs_embeds
        # A caller may pass the images of the whole conversation again beside a cache that holds some of them.
        start = num_cached
        if num_cached:
            (num_visual,) = _read_numbers(self._are_visual(input_ids).sum())
            num_placeholders = None  # of the whole prompt; some of its images may be in the cache
            if num_visual == sum(map(len, features)):
                start = 0
        types = None if mm_token_type_ids is None else mm_token_type_ids[:, start:]
        new_embeds = self._insert_images(
            input_ids[:, start:], inputs_embeds[:, start:], image_features, video_features, types, num_placeholders
        )
        return torch.cat([inputs_embeds[:, :start], new_embeds], dim=1)

    def _tokens_left_after(self, prompt_length: int, plan: "VideoPlan | None" = None) -> int:
        """Return how many tokens the context window leaves for the answer to a prompt; `plan` is that of its videos.

        Raises:
            ValueError: if it leaves none.
        """
        window = self.config.max_sequence_length
        if prompt_length >= window:
            of_videos, remedy = "", "Use fewer or smaller images (max_num_tiles), a shorter text, or drop old turns."
            if plan is not None:
                of_videos = f", {sum(plan.kept)} of them for {sum(plan.frames_per_video)} frames of video"
                remedy = (
                    f"Take fewer frames (num_frames, fps; {plan.tokens_per_frame} tokens a frame before pruning). "
                    + remedy
                )
            raise ValueError(
                f"The prompt has {prompt_length} tokens{of_videos}; the context of {window} tokens holds prompt and "
                f"answer. {remedy}"
            )
        return window - prompt_length

    def _prepare_generated_length(
        self, *args: Any, input_ids_length: int, inputs_tensor: torch.Tensor, **kwargs: Any
    ) -> GenerationConfig:
        """Limit the length of every answer to what the context window leaves."""
        options = super()._prepare_generated_length(
            *args, input_ids_length=input_ids_length, inputs_tensor=inputs_tensor, **kwargs
        )
        room = self._tokens_left_after(inputs_tensor.shape[1])
        wanted = options.max_length - input_ids_length  # embeddings alone have no ids
        if wanted > room:
            logger.warning(
                f"max_new_tokens={wanted} is cut to {room}: the prompt has {inputs_tensor.shape[1]} tokens and the "
                f"context of {self.config.max_sequence_length} holds prompt and answer."
            )
            options.max_length = input_ids_length + room
        return options

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one step: positions inside the prompt use the rows of `prompt_embeds`, later positions their ids.

        So an image token of the prompt stands for an image. An image token that the model writes, or that assisted
        decoding proposes, is an ordinary token. This also holds for chunked prefill and for decoding without a cache.
        """
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if self._has_virtual_tokens:  # PEFT embeds the ids by itself, behind its tokens
            if _num_cached(past_key_values):
                model_inputs.pop("mm_encoder_outputs", None)  # the images are in the cache now
            return model_inputs
        start = _num_cached(past_key_values) if prompt_embeds is not None else 0
        if prompt_embeds is not None and start < prompt_embeds.shape[1]:
            ids = model_inputs["input_ids"]
            rows = prompt_embeds[:, start : start + ids.shape[1]]
            written = self.get_input_embeddings()(ids[:, rows.shape[1] :])
            model_inputs["inputs_embeds"] = torch.cat([rows, written], dim=1)
            model_inputs["input_ids"] = None
        elif not kwargs.get("use_cache", True) and model_inputs.get("input_ids") is not None:
            # The answer is part of the input here, and an image token in it is no image.
            model_inputs["inputs_embeds"] = self.get_input_embeddings()(model_inputs.pop("input_ids"))
        return model_inputs

    @property
    def _has_virtual_tokens(self) -> bool:
        """Whether PEFT's prompt, prefix or P-tuning takes part in a generation, for which it wraps the method above."""
        wrapper = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        return bool(getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False))

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("prompt_embeds", None)  # the prompt is in the cache now
        return model_kwargs

    def _get_candidate_generator(
        self,
        *args: Any,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        assistant_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Any:
        """Give an assistant of this class the embedded prompt; another assistant proposes tokens without the images.

        Image tokens are removed from the proposals. A prompt lookup would find them in every prompt, but answers do
        not contain them.
        """
        model_kwargs = dict(model_kwargs)
        prompt_embeds = model_kwargs.pop("prompt_embeds", None)
        if prompt_embeds is not None and getattr(assistant_model, "config_class", None) is self.config_class:
            same_size = assistant_model.config.text_config.hidden_size == prompt_embeds.shape[-1]
            own_embeds = prompt_embeds if same_size else assistant_model.get_input_embeddings()(input_ids)
            model_kwargs["prompt_embeds"] = own_embeds
        generator = super()._get_candidate_generator(
            *args, input_ids=input_ids, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )
        propose = generator.get_candidates

        def propose_text(ids: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            candidates, logits = propose(ids, *rest, **more)
            is_image = (candidates[0, ids.shape[1] :] == self.config.image_token_id).tolist()
            if True not in is_image:
                return candidates, logits
            kept = is_image.index(True)
            return candidates[:, : ids.shape[1] + kept], logits[:, :kept] if logits is not None and kept else None

        generator.get_candidates = propose_text
        return generator


class NemotronVLModel:
    """A model without its head: computes hidden states of prompts with images.

    TRL's trainers call `model.base_model` and compute the scores of an answer from its hidden states in parts, so that
    the logits of a long page never exist all at once. This class is not a module, so that the weights keep their
    published names.

    Args:
        whole: the model with its head.
    """

    def __init__(self, whole: "NemotronVLForConditionalGeneration"):
        self._whole = whole

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        image_flags: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_patches: torch.Tensor | Sequence[int] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        num_video_frames: torch.Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute hidden states.

        Args: as for `NemotronVLForConditionalGeneration.forward`, without `labels` and `logits_to_keep`.

        Returns:
            `last_hidden_state`: `(batch_size, sequence_length, hidden_size)`, which the head turns into logits.
        """
        visual = VisualInputs(
            *(pixel_values, num_patches, image_flags, pixel_values_videos, num_video_frames),
            *(mm_encoder_outputs, mm_token_type_ids),
        )
        prompt, *_ = self._whole._language_model_inputs(
            input_ids, inputs_embeds, visual, kwargs.get("past_key_values")
        )
        decoder = self._whole.get_decoder()
        return decoder(**prompt, attention_mask=attention_mask, return_dict=True, **kwargs)


class Llama_Nemotron_Nano_VL(NemotronVLForConditionalGeneration, GenerationMixin):  # the published architecture string
    """The 8B V1: Llama 3.1, and tiles in 0..1, which the tower normalises."""

    config: NemotronVLConfig
    config_class = NemotronVLConfig
    prompt_format = V1_FORMAT
    prunes_videos = False
    # FSDP raises an error for a class name that no module has, so each model names only its own blocks.
    _no_split_modules = ["LlamaDecoderLayer", "RADIOBlock", "RADIOPatchGenerator"]

    @staticmethod
    def _build_language_model(text_config: PretrainedConfig) -> PreTrainedModel:
        # If this were None, transformers would write "sdpa" there.
        text_config._attn_implementation = text_config._attn_implementation or default_attention()
        return LlamaForCausalLM(text_config)

    @staticmethod
    def _build_projector(merged_size: int, hidden_size: int, text_size: int) -> list[nn.Module]:
        return [
            nn.LayerNorm(merged_size),
            nn.Linear(merged_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, text_size),
        ]

    def _pixel_limits(self) -> tuple[float, float, str]:
        remedy = (
            "this model takes RGB in 0..1 and normalises by itself. Let this checkpoint's image processor cut the tiles, as "
            "the adapters for VLMEvalKit and others in examples/clients/ do. The last resort makes tiles of another client "
            "run: image_processing.undo_normalization(pixel_values); the model was not trained on tiles cut another way, "
            "so its answers about them can be wrong without any sign"
        )
        return -PIXEL_TOLERANCE, 1 + PIXEL_TOLERANCE, remedy


class NemotronHBackbone(NemotronHForCausalLM or PreTrainedModel):
    """transformers' NemotronH under the published names: `backbone` instead of `model`."""

    base_model_prefix = "backbone"

    def __init__(self, config: PretrainedConfig):
        super(NemotronHForCausalLM, self).__init__(config)
        self.backbone = NemotronHModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for block in self.backbone.layers:
            if block.block_type == "linear_attention":
                # transformers 5.23 raises the time steps of a prompt to `time_step_min`, but not those of the single
                # tokens after it. That number is meant for drawing fresh weights; mamba-ssm by default raises neither.
                block.mixer.time_step_limit = tuple(config.time_step_limit)
        self.post_init()

    @property
    def model(self) -> PreTrainedModel:
        """The backbone, under transformers' name."""
        return self.backbone


class NemotronH_Nano_VL_V2(NemotronVLForConditionalGeneration, GenerationMixin):  # the published architecture string
    """The 12B V2: a hybrid of Mamba2, MLP and attention layers, and tiles that the image processor normalises.

    The Mamba layers run on `mamba-ssm` and `causal-conv1d` where these are installed, and in plain torch elsewhere.
    """

    config: NemotronVLV2Config
    config_class = NemotronVLV2Config
    accepts_uint8_tiles = False
    prompt_format = V2_FORMAT
    prunes_videos = True
    _no_split_modules = ["NemotronHBlock", "RADIOBlock", "RADIOPatchGenerator"]
    _is_stateful = True  # a Mamba state cannot go back, so there is no assisted decoding

    @staticmethod
    def _build_language_model(text_config: PretrainedConfig) -> PreTrainedModel:
        return NemotronHBackbone(text_config)

    @staticmethod
    def _build_projector(merged_size: int, hidden_size: int, text_size: int) -> list[nn.Module]:
        return [
            ProjectorRMSNorm(merged_size),
            nn.Linear(merged_size, hidden_size, bias=False),
            SquaredReLU(),
            nn.Linear(hidden_size, text_size, bias=False),
        ]

    def _pixel_limits(self) -> tuple[float, float, str]:
        statistics = list(zip(self.config.norm_mean, self.config.norm_std, strict=True))
        low = min((-BICUBIC_OVERSHOOT - mean) / std for mean, std in statistics)
        high = max((1 + BICUBIC_OVERSHOOT - mean) / std for mean, std in statistics)
        return low, high, "this model takes normalised tiles. Use this checkpoint's image processor"

    @staticmethod
    def create_masks_for_generate(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor | None]:
        """Make the masks of one step of a compiled `generate`, for attention and Mamba layers."""
        return NemotronHForCausalLM.create_masks_for_generate(*args, **kwargs)


def _dropped_of_rows(
    frames: Sequence[int], kept: Sequence[int], tokens_per_frame: int, tokens_of_rows: Sequence[int]
) -> list[int]:
    """Return how many tokens of its videos each row of a batch loses.

    Args:
        frames, kept: frames of each video in order, and the tokens of it that are kept.
        tokens_per_frame: before pruning.
        tokens_of_rows: video tokens of each row.

    Raises:
        ValueError: if a video does not end where its row does.
    """
    dropped, left = [], iter(zip(frames, kept, strict=True))
    for tokens in tokens_of_rows:
        dropped.append(0)
        while tokens > 0:
            num_frames, num_kept = next(left, (sum(tokens_of_rows), 0))
            tokens -= num_frames * tokens_per_frame
            dropped[-1] += num_frames * tokens_per_frame - num_kept
        if tokens:
            raise ValueError(
                f"num_video_frames={list(frames)} does not fit the prompts, whose rows have {list(tokens_of_rows)} video "
                f"tokens at {tokens_per_frame} a frame. Pass what the processor returned."
            )
    return dropped


def _with_prompt(output: Any, input_ids: torch.Tensor, num_pruned: int) -> Any:
    """Return what `generate` made of a pruned prompt of `num_pruned` tokens, with the whole prompt in its place."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, num_pruned:]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output


class VisualInputs(NamedTuple):
    """The arguments of `forward` about images and videos, as they came."""

    pixel_values: torch.Tensor | None
    num_patches: torch.Tensor | Sequence[int] | None
    image_flags: torch.Tensor | None
    pixel_values_videos: torch.Tensor | None
    num_video_frames: torch.Tensor | Sequence[int] | None
    mm_encoder_outputs: Mapping[str, BaseModelOutputWithPooling] | None
    mm_token_type_ids: torch.Tensor | None


class VideoPlan(NamedTuple):
    """The videos of a prompt, and what is kept of them.

    Attributes:
        frames_per_video: frames of each video.
        tokens_per_frame: visual tokens of a frame, before pruning.
        pruning_rate: 0 if nothing is pruned.
        kept: tokens of each video that are kept.
        videos: bool `(batch_size, sequence_length)`, the tokens of videos.
        attended: bool `(batch_size, sequence_length)`, all but the padding at the beginning.
        prompt_length: tokens of the longest row after pruning, without padding; without pruning those of the batch.
    """

    frames_per_video: list[int]
    tokens_per_frame: int
    pruning_rate: float
    kept: list[int]
    videos: torch.Tensor
    attended: torch.Tensor
    prompt_length: int

    @property
    def prunes(self) -> bool:
        return self.pruning_rate > 0


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to the device of the weights. If these are offloaded ("meta"), accelerate's hooks do it later."""
    if device.type == "meta" or tensor.device == device:
        return tensor
    # CUDA has read ordinary memory when the call returns, so the host need not wait for the copy. It may still read
    # pinned memory, which the caller may overwrite.
    from_host = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.to(device, non_blocking=from_host and not tensor.is_pinned())


def _read_numbers(*values: Any) -> list[Any]:
    """Return the numbers of small tensors, scalars as numbers and others as lists; everything else as it is.

    Tensors of a GPU come in one copy, because the host waits for each. Whole numbers are exact up to 2**24.
    """
    on_device = [value for value in values if isinstance(value, torch.Tensor) and value.device.type != "cpu"]
    if on_device:
        joined = torch.cat([value.detach().flatten().to(on_device[0].device, torch.float32) for value in on_device])
        rows = iter(joined.cpu().split([value.numel() for value in on_device]))
    read = []
    for value in values:
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            value = next(rows).to(value.dtype).view(value.shape)
        read.append(value.tolist() if isinstance(value, torch.Tensor) else value)
    return read


def _extremes(pixel_values: torch.Tensor) -> torch.Tensor | None:
    """Return the smallest and the largest pixel, `(2,)`; None for uint8, which cannot be out of range, and no pixels."""
    if pixel_values.dtype == torch.uint8 or pixel_values.numel() == 0:
        return None
    return torch.stack(pixel_values.aminmax())


def _join(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors; a single one is returned without a copy."""
    return torch.cat(list(batches)) if len(batches) > 1 else batches[0]


def _features_of(image_outputs: BaseModelOutputWithPooling | None) -> torch.Tensor | None:
    """Return the features of all images, `(num_visual_tokens, hidden_size)`; None if there are no images."""
    if image_outputs is None or len(image_outputs.pooler_output) == 0:
        return None
    return _join(image_outputs.pooler_output)


def _join_layers(layers_of_batches: Sequence[tuple[torch.Tensor, ...] | None]) -> tuple[torch.Tensor, ...] | None:
    """Join what the tower recorded per layer for each batch of tiles; None if it recorded nothing."""
    if layers_of_batches[0] is None:
        return None
    return tuple(_join(layer) for layer in zip(*layers_of_batches, strict=True))


def _select_tiles(
    name: str,
    tiles: torch.Tensor,
    num_patches: torch.Tensor | Sequence[int] | None,
    image_flags: torch.Tensor | None,
) -> tuple[torch.Tensor, list[int]]:
    """Return the tiles whose flag is 1, without flags all, and how many of them belong to each image.

    Args: `name` of the tiles for errors; the others as for `get_image_features`.

    Raises:
        ValueError: if `num_patches` does not add up to the tiles.
    """
    num_tiles = len(tiles)
    tiles_per_image = [1] * num_tiles if num_patches is None else [int(own) for own in num_patches]
    if sum(tiles_per_image) != num_tiles:
        raise ValueError(
            f"num_patches={tiles_per_image} counts {sum(tiles_per_image)} tiles, but {name} holds {num_tiles}. Pass "
            "both as one processor call returned them."
        )
    if image_flags is None:
        return tiles, tiles_per_image
    flags = image_flags.flatten().to(tiles.device) == 1
    return tiles[flags], torch.stack([own.sum() for own in flags.split(tiles_per_image)]).tolist()


def _check_shape(name: str, tensor: Any, layout: str, width: int | None = None) -> None:
    """Raise if `tensor` is no tensor of as many dimensions as `layout` names, the last of size `width` if given."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}.")
    if tensor.ndim != layout.count(",") + 1 or width not in (None, tensor.shape[-1]):
        wanted = f" with a width of {width}" if width else ""
        raise ValueError(f"{name} must be a tensor {layout}{wanted}, got the shape {tuple(tensor.shape)}.")


def _num_cached(past_key_values: Any | None) -> int:
    """Positions that a cache already holds."""
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


def _begins_prompt(input_ids: torch.Tensor, past_key_values: Any | None) -> bool:
    """Whether nothing comes before these ids. Only then can an image token stand for an image."""
    if past_key_values is None:
        return True
    # Single tokens are decoding steps: reading the length of a static cache on a GPU would make each of them wait.
    return input_ids.shape[1] > 1 and not torch.compiler.is_compiling() and _num_cached(past_key_values) == 0


def _check_counts(num_placeholders: torch.Tensor | int, num_features: int, kind: str = "image") -> None:
    """Raise if the prompt's tokens of images, or of videos, and their features differ in number."""
    pixels, token = ("pixel_values", IMAGE_TOKEN) if kind == "image" else ("pixel_values_videos", VIDEO_TOKEN)
    message = (
        f"The prompt has {{}} {kind} tokens, but the {kind}s give {{}} features. Build input_ids and {pixels} with the "
        f"same processor call, and pass the {kind}s of every {token} in the prompt."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(num_placeholders == num_features, message.format("a different number of", num_features))
    elif int(num_placeholders) != num_features:
        raise ValueError(message.format(int(num_placeholders), num_features))


def _check_pixel_range(name: str, extremes: list[float] | None, lowest: float, highest: float, remedy: str) -> None:
    """Raise for tiles with values that the model's own image processor never makes."""
    if extremes is not None and not (extremes[0] >= lowest and extremes[1] <= highest):
        raise ValueError(f"{name} lie in {extremes[0]:.3f}..{extremes[1]:.3f}, but {remedy}.")


Llama_Nemotron_Nano_VL.register_for_auto_class("AutoModel")
NemotronH_Nano_VL_V2.register_for_auto_class("AutoModel")
