"""Tiles of the stand-in, with PIL and torch alone."""

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor
from transformers.image_processing_utils import BatchFeature


class LlamaNemotronNanoVLImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]

    def __init__(self, image_size=512, max_num_tiles=12, use_thumbnail=True, **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.max_num_tiles, self.use_thumbnail = image_size, max_num_tiles, use_thumbnail

    def preprocess(self, images, **kwargs):
        tiles, counts = [], []
        for image in images if isinstance(images, list) else [images]:
            cut = self.cut(image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR))
            tiles.append(cut)
            counts.append(len(cut))
        return BatchFeature({"pixel_values": torch.cat(tiles) * (1 / 255), "num_patches": counts})

    def cut(self, image):
        limit, size = self.max_num_tiles, self.image_size
        pairs = {
            (i, j) for n in range(1, limit + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= limit
        }
        best, best_score = None, -1.0
        for i, j in sorted(pairs, key=lambda pair: pair[0] * pair[1]):
            aspect, shape = image.width / image.height, i / j
            cover = min(i * j * size * size / (image.width * image.height), 0.6)
            score = cover * min(shape / aspect, aspect / shape)
            if score > best_score:
                best, best_score = (i, j), score
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]

        def resize(height, width):
            return torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]

        columns, rows = best
        whole = resize(size * rows, size * columns)
        tiles = [tile for strip in whole.split(size, 1) for tile in strip.split(size, 2)]
        if self.use_thumbnail and len(tiles) > 1:
            tiles.append(resize(size, size))
        return torch.stack(tiles)
