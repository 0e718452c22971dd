"""Small models run on one thread, unless the user chooses another number."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tools import chat, demo
from tools.chat import load
from tools.threads import NUM_PARAMETERS_OF_SMALL, choose_threads


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    num_threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)


class Sized(nn.Module):
    def __init__(self, num_parameters: int, device: str = "cpu"):
        super().__init__()
        self.size = num_parameters
        self.device = torch.device(device)

    def num_parameters(self) -> int:
        return self.size


def test_a_small_model_gets_one_thread_and_the_reason_is_said(capsys):
    choose_threads(Sized(4_000_000))
    assert torch.get_num_threads() == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(
        "One thread instead of 2: a model of 4.0 M parameters is quick on one"
    )
    choose_threads(Sized(4_000_000))  # nothing changes, so nothing is said
    assert capsys.readouterr().err == ""


def test_the_number_that_the_user_chose_wins(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    choose_threads(Sized(4_000_000))
    assert torch.get_num_threads() == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("model", [Sized(NUM_PARAMETERS_OF_SMALL), Sized(4_000_000, "cuda")])
def test_large_models_and_gpus_keep_what_torch_chooses(model, capsys):
    choose_threads(model)
    assert torch.get_num_threads() == 2 and capsys.readouterr().err == ""


def test_the_demo_answers_on_one_thread(tiny_checkpoint, tmp_path):
    demo.run(tiny_checkpoint, Image.new("RGB", (40, 30)), tmp_path / "tiles.png")
    assert torch.get_num_threads() == 1


def test_the_chat_answers_on_one_thread(tiny_checkpoint):
    chat.main(["--model", str(tiny_checkpoint), "--question", "What?"])
    assert torch.get_num_threads() == 1


def test_a_fine_tune_runs_on_one_thread(tiny_checkpoint, tmp_path):
    from training.finetune import Recipe, finetune

    trainer = {"max_steps": 1, "per_device_train_batch_size": 1, "use_cpu": True, "disable_tqdm": True}
    finetune(Recipe(model=str(tiny_checkpoint), output=str(tmp_path), num_documents=1, trainer=trainer))
    assert torch.get_num_threads() == 1


def test_a_thread_that_streams_an_answer_has_the_same_number(tiny_checkpoint: Path):
    model, processor = load(tiny_checkpoint)
    choose_threads(model)
    found = []
    model.register_forward_hook(lambda *_: found.append(torch.get_num_threads()))
    "".join(model.chat_stream(processor, question="What?", generation_config={"max_new_tokens": 2}))
    assert found and set(found) == {1}
