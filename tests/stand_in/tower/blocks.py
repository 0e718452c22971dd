"""A plain vision transformer with the names of the checkpoint."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Output(NamedTuple):
    summary: torch.Tensor
    features: torch.Tensor


class Conditioner(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("norm_mean", torch.zeros(3, 1, 1))
        self.register_buffer("norm_std", torch.ones(3, 1, 1))

    def forward(self, pixel_values):
        return ((pixel_values - self.norm_mean) / self.norm_std).to(self.dtype)


class ClassTokens(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8, width))


class PatchGenerator(nn.Module):
    def __init__(self, width, grid):
        super().__init__()
        self.grid = grid
        self.embedder = nn.Linear(768, width, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, width))
        self.cls_token = ClassTokens(width)

    def forward(self, pixels):
        count, _, height, width = pixels.shape
        rows, columns = height // 16, width // 16
        patches = pixels.view(count, 3, rows, 16, columns, 16).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        table = self.pos_embed.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2).float()
        side = max(rows, columns)
        table = functional.interpolate(table, (side, side), mode="bilinear", align_corners=True)
        position = table[:, :, :rows, :columns].flatten(2).transpose(1, 2).to(pixels.dtype)
        prefix = self.cls_token.token.expand(count, -1, -1)
        return torch.cat((prefix, self.embedder(patches) + position), 1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens):
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens):
        return self.fc2(functional.gelu(self.fc1(tokens)))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, hidden)

    def forward(self, tokens):
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    def __init__(self, shape, grid):
        super().__init__()
        width = shape["embed_dim"]
        self.patch_generator = PatchGenerator(width, grid)
        hidden = int(width * shape.get("mlp_ratio", 4.0))
        self.blocks = nn.ModuleList(Block(width, shape["num_heads"], hidden) for _ in range(shape["depth"]))

    def forward(self, pixels):
        tokens = self.patch_generator(pixels)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class Radio(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.input_conditioner = Conditioner(torch.bfloat16)
        self.model = Transformer(args["model_kwargs"], args["cpe_max_size"] // 16)

    def forward(self, pixel_values):
        tokens = self.model(self.input_conditioner(pixel_values))
        return Output(tokens[:, :3].flatten(1), tokens[:, 8:])
