"""The stand-in's tower, in the layout of the C-RADIO repositories: an entry file that imports a neighbour."""

from transformers import PretrainedConfig, PreTrainedModel

from .blocks import Radio


class RADIOConfig(PretrainedConfig):
    def __init__(self, args=None, **kwargs):
        super().__init__(**kwargs)
        self.args = args


class RADIOModel(PreTrainedModel):
    config_class = RADIOConfig

    def __init__(self, config):
        super().__init__(config)
        self.radio_model = Radio(config.args)
        self.post_init()

    def forward(self, pixel_values):
        return self.radio_model(pixel_values)
