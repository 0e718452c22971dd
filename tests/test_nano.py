"""Nano, the trained checkpoint: it loads by every Auto class, reads the bundled receipt, and the tools show how."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from nemotron_vl.image_processing import load_image
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from documents.distance import edit_distance
from documents.example import example_page
from pretraining.nano import TILING, build_model, load_tokenizer
from pretraining.tokenizer import build_tokenizer
from tools import ROOT, adopt, chat
from tools.chat import Conversation, describe, draw_tiles, load
from tools.demo import RECEIPT

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def nano():
    return load(ROOT / "nano")


@pytest.fixture(scope="module")
def receipt() -> Image.Image:
    return Image.open(RECEIPT).convert("RGB")


def test_nano_is_small_and_holds_no_code():
    files = list((ROOT / "nano").iterdir())
    assert sum(file.stat().st_size for file in files) < 40 * MEGABYTE
    assert not [file for file in files if file.suffix == ".py"]


def test_nano_loads_from_its_subfolder():
    where = {"subfolder": "nano", "trust_remote_code": True}
    assert type(AutoModel.from_pretrained(ROOT, **where)).__name__ == "Llama_Nemotron_Nano_VL"
    assert AutoProcessor.from_pretrained(ROOT, **where).image_processor.image_size == 512
    assert AutoTokenizer.from_pretrained(ROOT, **where).convert_tokens_to_ids("<image>") is not None


def test_weights_have_the_published_names(nano):
    names = set(nano[0].state_dict())
    assert names >= {"vision_model.radio_model.model.patch_generator.pos_embed", "mlp1.0.weight", "mlp1.3.bias"}
    assert all(name.startswith(("vision_model.radio_model.", "mlp1.", "language_model.")) for name in names)


def test_the_training_scripts_build_the_shipped_checkpoint(nano):
    shapes = {name: weight.shape for name, weight in nano[0].state_dict().items()}
    assert {name: weight.shape for name, weight in build_model(load_tokenizer()).state_dict().items()} == shapes
    settings = json.loads((ROOT / "nano" / "preprocessor_config.json").read_text())
    assert settings.items() >= TILING.items()


def test_the_tokenizer_can_be_built_again():
    assert build_tokenizer().get_vocab() == load_tokenizer().get_vocab()


def test_nano_reads_the_bundled_receipt(nano, receipt, capsys):
    conversation = Conversation(*nano, [receipt])
    assert conversation.ask("What is the total?") == "72.13"
    assert conversation.ask("Who is the seller?") == "Claisaid Tools"
    assert conversation.ask("What is the VAT?") == "5.06"
    assert "72.13" in capsys.readouterr().out
    read = Conversation(*nano, [receipt]).ask("Transcribe the page.")
    assert edit_distance(read, example_page().text) <= 0.06 * len(example_page().text)


def test_a_page_at_an_angle_is_answered_with_low_confidence(nano, receipt):
    """The size of type says nothing of it, and most answers are that there is no such thing."""
    questions = ("What is the total?", "Who is the seller?", "What is the date?", "What is the receipt number?")
    confidences = []
    for degrees in (0, 15):
        turned = receipt.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
        conversation = Conversation(*nano, [turned])
        for question in questions:
            conversation.history = None
            conversation.ask(question)
            confidences.append(conversation.confidence)
    assert sum(confidences[:4]) / 4 > 0.8 > 0.6 > sum(confidences[4:]) / 4


def test_a_batch_answers_like_single_questions(nano, receipt):
    model, processor = nano
    features = processor.image_processor([receipt, receipt], return_tensors="pt")
    questions = ["What is the total?", "Which date is on the page?"]
    together = model.chat(processor, question=questions, generation_config={"max_new_tokens": 20}, **features)
    alone = [Conversation(model, processor, [receipt], 20).ask(question) for question in questions]
    assert together == alone


def test_typed_questions_are_turns_of_one_conversation(nano, monkeypatch, capsys, tmp_path):
    turns = []

    class Model:
        config = SimpleNamespace(max_sequence_length=4096)

        def chat(self, processor, question, history, **options):
            turns.append((question, history, len(options["pixel_values"])))
            return "Yes.", [*(history or []), (question, "Yes.")], 0.25

    typed = iter(["Is it paid?", "And sent?"])

    def type_or_end(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_or_end)
    monkeypatch.setattr(chat, "load", lambda directory: (Model(), nano[1]))
    monkeypatch.setattr(chat, "choose_threads", lambda model: None)
    assert chat.main([str(RECEIPT), "--tiles", str(tmp_path / "tiles.png")]) == 0
    assert turns == [
        ("<image>\nIs it paid?", None, 2),
        ("And sent?", [("<image>\nIs it paid?", "Yes.")], 2),
    ]
    said = capsys.readouterr().out
    assert "1 x 2 tiles -> 514 tokens" in said and said.count("(confidence 25.0 %)") == 2
    assert Image.open(tmp_path / "tiles.png").size == Image.open(RECEIPT).size


def test_tiles_are_described_and_drawn(nano, receipt):
    processor = nano[1]
    assert describe(processor, receipt).endswith("1 x 2 tiles -> 514 tokens")
    square = receipt.resize((receipt.width, receipt.width))
    assert describe(processor, square).endswith("1 x 1 tiles -> 258 tokens")
    page = draw_tiles(processor.image_processor, receipt)
    assert page.size == receipt.size and page.tobytes() != receipt.tobytes()


def test_files_are_shown_as_the_processor_reads_them(nano, receipt, tmp_path):
    """A photo that its EXIF tag turns, a drawing on nothing, which is white and not black, and a scan of 16 bits."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    receipt.crop((0, 0, 60, 100)).save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(tmp_path / "transparent.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(tmp_path / "deep.png")
    for name, size in (("turned.png", (100, 60)), ("transparent.png", (30, 20)), ("deep.png", (30, 20))):
        image = load_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", size)
        of_file, of_image = (nano[1].image_processor(given) for given in (tmp_path / name, image))
        assert of_file["pixel_values"].equal(of_image["pixel_values"])


@pytest.mark.slow
def test_nano_becomes_a_flat_directory_that_needs_nothing_else(nano, receipt, tmp_path):
    """For clients that take only a path: code, configs, weights and tokenizer together, loaded where this
    repository cannot be seen."""
    assert adopt.main([str(ROOT / "nano"), "--out", str(tmp_path / "flat"), "--copy"]) == 0
    receipt.save(tmp_path / "receipt.png")
    code = (
        "import sys; from transformers import AutoModel, AutoProcessor, AutoTokenizer; from PIL import Image\n"
        "where = {'pretrained_model_name_or_path': sys.argv[1], 'trust_remote_code': True}\n"
        "model, processor = AutoModel.from_pretrained(**where), AutoProcessor.from_pretrained(**where)\n"
        "features = processor.image_processor(Image.open('receipt.png'), return_tensors='pt')\n"
        "print(model.chat(AutoTokenizer.from_pretrained(**where), question='What is the total?', **features))\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(tmp_path / "flat")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    features = nano[1].image_processor(receipt, return_tensors="pt")
    assert done.stdout.strip() == nano[0].chat(nano[1], question="What is the total?", **features)
