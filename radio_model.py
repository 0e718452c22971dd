"""C-RADIOv2, the vision tower: computes one summary vector per image and one feature vector per patch.

It is a plain pre-norm ViT. Its square position table is resized to the image, so any height and width in whole patches
work. Module names are those of the published weights (`radio_model.model.blocks.0.attn.qkv.weight`, ...). `RADIOModel`
is the `vision_model` of the VLM, and also loads a stand-alone C-RADIO checkpoint directory through `AutoModel`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .checkpoint import StrictPreTrainedModel
from .configuration_nemotron_vl import RADIOConfig

try:
    from transformers.utils.output_capturing import capture_outputs
except ImportError:  # transformers 4.57 has the same decorator under an older name
    from transformers.utils.generic import check_model_inputs as capture_outputs


@dataclass
class RADIOModelOutput(ModelOutput):
    """What the tower returns; `output[:2]` is the published pair (summary, features).

    Args:
        summary: `(num_images, num_summary_tokens * hidden_size)`, the class tokens of `config.summary_idxs`, joined.
        features: `(num_images, grid_height * grid_width, hidden_size)`, one vector per patch, row-major.
        last_hidden_state: `(num_images, num_prefix_tokens + grid_height * grid_width, hidden_size)`, the sequence
            that both are taken from.
        hidden_states: with `output_hidden_states=True`, the input of the first block and the output of each block.
        attentions: with `output_attentions=True` and eager attention, per block
            `(num_images, num_attention_heads, sequence_length, sequence_length)`.
    """

    summary: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class RADIOInputConditioner(nn.Module):
    """Normalise RGB pixels in 0..1 with the tower's own mean and standard deviation, unless they are normalised."""

    def __init__(self, config: RADIOConfig):
        super().__init__()
        self.config = config
        for name in ("norm_mean", "norm_std"):
            values = torch.tensor(getattr(config, name), dtype=torch.float32)
            self.register_buffer(name, values.view(-1, 1, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # CODEPATH: the 12B V2, whose image processor normalises. Its checkpoint holds these numbers nevertheless.
        if self.config.external_normalization:
            return pixel_values
        return (pixel_values - self.norm_mean) / self.norm_std


class RADIOPrefixTokens(nn.Module):
    """Learned class and register tokens; they get no position embedding."""

    def __init__(self, config: RADIOConfig):
        super().__init__()
        self.token = nn.Parameter(torch.empty(config.num_prefix_tokens, config.hidden_size))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], dim=1)


class RADIOPatchGenerator(nn.Module):
    """Turns normalised pixels into the token sequence: the prefix tokens, then projected patches plus positions."""

    def __init__(self, config: RADIOConfig):
        super().__init__()
        self.config = config
        num_channels = len(config.norm_mean)
        self.embedder = nn.Linear(num_channels * config.patch_size**2, config.hidden_size, bias=False)
        self.pos_embed = nn.Parameter(torch.empty(1, config.position_grid_size**2, config.hidden_size))
        self.cls_token = RADIOPrefixTokens(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            pixel_values: `(num_images, num_channels, height, width)`, normalised.

        Returns:
            `(num_images, num_prefix_tokens + grid_height * grid_width, hidden_size)`.
        """
        grid_height, grid_width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        # The position table has the tower's dtype; the embedder's weight may be packed by a quantiser.
        patches = self.embedder(self.patchify(pixel_values.to(self.pos_embed.dtype)))
        return self.cls_token(patches + self.positions(grid_height, grid_width))

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cut images into patches.

        Args:
            pixel_values: `(num_images, num_channels, height, width)`.

        Returns:
            `(num_images, grid_height * grid_width, num_channels * patch_size**2)`, patches row-major, values of a
            patch ordered (channel, y, x).
        """
        num_images, num_channels, height, width = pixel_values.shape
        size = self.config.patch_size
        blocks = pixel_values.reshape(num_images, num_channels, height // size, size, width // size, size)
        blocks = blocks.permute(0, 2, 4, 1, 3, 5)  # (num_images, rows, columns, channel, y, x)
        return blocks.reshape(num_images, -1, num_channels * size**2)

    def position_table(self) -> torch.Tensor:
        """Return the table as an image, `(1, hidden_size, position_grid_size, position_grid_size)`."""
        side = self.config.position_grid_size
        return self.pos_embed.view(1, side, side, -1).permute(0, 3, 1, 2)

    def positions(self, grid_height: int, grid_width: int) -> torch.Tensor:
        """Resize the whole table to a square over the longer side of the grid and keep its top left part.

        Returns:
            `(1, grid_height * grid_width, hidden_size)` in the table's dtype, interpolated in float32.
        """
        table = self.position_table()
        side = max(grid_height, grid_width)
        if side != table.shape[-1]:
            resized = nn.functional.interpolate(
                table.float(), size=(side, side), mode="bilinear", align_corners=self.config.align_corners
            )
            table = resized.to(table.dtype)
        return table[..., :grid_height, :grid_width].flatten(2).transpose(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention, the "eager" entry of transformers' attention interface.

    Args:
        query, key, value: `(num_images, num_attention_heads, sequence_length, head_dim)`.
        attention_mask: added to the scores when given.

    Returns:
        Output `(num_images, sequence_length, num_attention_heads, head_dim)` and attention weights
        `(num_images, num_attention_heads, sequence_length, sequence_length)`.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class RADIOAttention(nn.Module):
    """Full self-attention with one fused projection; its rows are ordered query, key, value."""

    def __init__(self, config: RADIOConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_images, sequence_length, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(num_images, sequence_length, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (num_images, heads, sequence, head_dim)
        # transformers 4.57 has no `get_interface`, which is `get` with a check of the name
        get_interface = getattr(ALL_ATTENTION_FUNCTIONS, "get_interface", ALL_ATTENTION_FUNCTIONS.get)
        attend: Callable = get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, None, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.proj(output.reshape(num_images, sequence_length, -1)), weights


class RADIOMLP(nn.Module):
    def __init__(self, config: RADIOConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class RADIOBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: RADIOConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = RADIOAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = RADIOMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.norm2(hidden_states))


class RADIOVisionTransformer(nn.Module):
    """Patch generator and blocks, `radio_model.model` in the published keys."""

    def __init__(self, config: RADIOConfig):
        super().__init__()
        self.patch_generator = RADIOPatchGenerator(config)
        self.blocks = nn.ModuleList([RADIOBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.Identity()
        # CODEPATH: checkpoints trained with `args.model_norm`; the released towers have no final norm.
        if config.use_final_norm:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = self.patch_generator(pixel_values)
        for block in self.blocks:
            hidden_states = block(hidden_states, **kwargs)
        return self.norm(hidden_states)


class RADIOConditionedTransformer(nn.Module):
    """Conditioner and transformer, `radio_model` in the published keys."""

    def __init__(self, config: RADIOConfig):
        super().__init__()
        self.input_conditioner = RADIOInputConditioner(config)
        self.model = RADIOVisionTransformer(config)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        return self.model(self.input_conditioner(pixel_values), **kwargs)


class RADIOModel(StrictPreTrainedModel):
    """The C-RADIOv2 tower, inside the VLM or on its own. It computes the same in training and in inference."""

    config: RADIOConfig
    # The VLM's name for the tower: `RADIOModel.from_pretrained` also takes the tower out of a VLM checkpoint.
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RADIOPatchGenerator", "RADIOBlock"]
    # The other weights of a VLM, and the heads for the tower's teachers, are not loaded.
    _refused_on_load = ("missing_keys",)
    _keys_to_ignore_on_load_unexpected = [r"summary_idxs$"]  # a constant of the config
    _keys_to_ignore_on_load_missing = [r"input_conditioner\.norm_(mean|std)$"]  # the config has them, too
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RADIOBlock, "attentions": RADIOAttention}

    def __init__(self, config: RADIOConfig):
        super().__init__(config)
        self.radio_model = RADIOConditionedTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.radio_model.model.patch_generator.embedder

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.radio_model.model.patch_generator.embedder = value

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Return True. transformers would search this file's text for a name that differs between its versions."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RADIOPatchGenerator):
            nn.init.trunc_normal_(module.pos_embed, std=self.config.initializer_range)
        elif isinstance(module, RADIOPrefixTokens):
            nn.init.trunc_normal_(module.token, std=self.config.initializer_range)
        elif isinstance(module, RADIOInputConditioner):
            for name, buffer in module.named_buffers():
                if not getattr(buffer, "_is_hf_initialized", False):  # transformers 5 guards only torch.nn.init
                    buffer.copy_(torch.tensor(getattr(self.config, name), dtype=torch.float32).view(-1, 1, 1))

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        x: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RADIOModelOutput:
        """Encode images of one size.

        Args:
            pixel_values: `(num_images, 3, height, width)` RGB in 0..1, height and width in pixels, multiples of
                `config.patch_size`. They are normalised in their own precision, then cast to the dtype of the weights.
                With `config.external_normalization` they have to be normalised already.
            x: the published name of the same argument (vLLM uses it).

        Returns:
            `RADIOModelOutput`, or its tuple with `return_dict=False`.

        Raises:
            ValueError: if both or none of the names are given, or the shape does not fit.
            TypeError: for pixels that are not floating point.
        """
        if (pixel_values is None) == (x is None):
            raise ValueError("Give the tower its images once: as `pixel_values`, or as `x`.")
        pixel_values = x if pixel_values is None else pixel_values
        self._check_pixels(pixel_values)
        hidden_states = self.radio_model(pixel_values, **kwargs)
        num_patches = pixel_values.shape[-2] * pixel_values.shape[-1] // self.config.patch_size**2
        # Slices, because a list as an index is copied to the device in every call. An empty slice is for no index.
        chosen = [hidden_states[:, index] for index in self.config.summary_idxs]
        return RADIOModelOutput(
            summary=torch.cat([hidden_states[:, :0].flatten(1), *chosen], dim=-1),
            features=hidden_states[:, -num_patches:],
            last_hidden_state=hidden_states,
        )

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        num_channels, size = len(self.config.norm_mean), self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
            raise ValueError(
                f"The tower takes pixel_values of shape (num_images, {num_channels}, height, width), "
                f"got {tuple(pixel_values.shape)}. Stack tiles along the first dimension."
            )
        height, width = pixel_values.shape[-2:]
        if height % size or width % size or not height or not width:
            raise ValueError(
                f"The tower takes heights and widths in multiples of patch_size={size} px, "
                f"got {height}x{width} px. Resize or pad the image."
            )
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"The tower takes floating point pixels in 0..1, got {pixel_values.dtype}. Divide 0..255 by 255."
            )


RADIOModel.register_for_auto_class("AutoModel")
