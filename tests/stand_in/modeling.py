"""A stand-in for the published modeling code, which is not in this repository: plain, with the published habits that
a comparison has to live with (`.cuda()`, bfloat16 written into it, a tower from another repository)."""

import torch
from torch import nn
from transformers import AutoModel, LlamaForCausalLM, PreTrainedModel

from .configuration import Llama_Nemotron_Nano_VL_Config


class Llama_Nemotron_Nano_VL(PreTrainedModel):  # noqa: N801 (the published name)
    config_class = Llama_Nemotron_Nano_VL_Config
    _keys_to_ignore_on_load_missing = [r"summary_idxs"]

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config, trust_remote_code=True)
        self.language_model = LlamaForCausalLM(config.llm_config)
        merged = 4 * config.vit_hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged),
            nn.Linear(merged, config.projector_hidden_size),
            nn.GELU(),
            nn.Linear(config.projector_hidden_size, config.llm_config.hidden_size),
        )
        self.post_init()

    def extract_feature(self, pixel_values):
        features = self.vision_model(pixel_values).features.to(torch.bfloat16)
        side = int(features.shape[1] ** 0.5)
        grid = features.view(len(features), side, side, -1)
        corners = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return self.mlp1(torch.cat(corners, dim=-1).flatten(1, 2))

    def chat(
        self,
        tokenizer,
        pixel_values,
        question,
        generation_config,
        history=None,
        num_patches=None,
        system_prompt=None,
    ):
        if history is None and pixel_values is not None and "<image>" not in question:
            question = "<image>\n" * len(num_patches) + question
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        for asked, answered in history or []:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens_per_tile = (self.config.force_image_size // self.config.patch_size // 2) ** 2
        for tiles in num_patches or []:
            text = text.replace("<image>", "<img>" + "\0" * tokens_per_tile * tiles + "</img>", 1)
        ids = tokenizer(text.replace("\0", "<image>"), add_special_tokens=False, return_tensors="pt")
        input_ids, attention_mask = ids["input_ids"].cuda(), ids["attention_mask"].cuda()
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image = input_ids == tokenizer.convert_tokens_to_ids("<image>")
            embeddings[image] = self.extract_feature(pixel_values).flatten(0, 1)
        generation_config["pad_token_id"] = tokenizer.eos_token_id
        output = self.language_model.generate(
            inputs_embeds=embeddings, attention_mask=attention_mask, **generation_config
        )
        return tokenizer.decode(output[0]).split(tokenizer.eos_token)[0].strip()
