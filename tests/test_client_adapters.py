"""The adapters in examples/clients: by calls restated from each client, and by the clients where they are installed.

docs/clients.md has the commands that install them, each into an environment of its own:

    python -m pytest -q tests/test_client_adapters.py
"""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from nemotron_vl.image_processing import select_tile_grid
from nemotron_vl.reading.engines import page_prompt_of
from nemotron_vl.reading.pages import PAGE_PROMPT
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor

from tools import ROOT, adopt

CLIENTS = ROOT / "examples/clients"
RECEIPT = ROOT / "examples/receipt.png"
QUESTION, ANSWER = "What is the total?", "72.13"
REMOTE = {"trust_remote_code": True}


# What users of the trainers write, and the same as parts of a message.
TEXTS = [
    (f"<image>{QUESTION}", ["<image>", QUESTION]),
    (f"<image>\n{QUESTION}", ["<image>", QUESTION]),
    (f"{QUESTION}\n<image>", [f"{QUESTION}\n", "<image>"]),
    (f"<image>\n<image>{QUESTION}", ["<image>", "<image>", QUESTION]),
    ("Hi", ["Hi"]),
]


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    """A flat directory, as the clients take it."""
    folder = tmp_path_factory.mktemp("flat") / "nano"
    assert adopt.main([str(ROOT / "nano"), "--out", str(folder), "--copy"]) == 0
    return folder


@pytest.fixture(scope="module")
def processor(nano) -> Any:
    return AutoProcessor.from_pretrained(nano, **REMOTE)


def adapter(name: str, monkeypatch: pytest.MonkeyPatch | None = None, **modules: dict[str, Any]) -> types.ModuleType:
    """Import an adapter; `modules` are stand-ins for those of its client, "__" in their names being a dot."""
    for dotted, content in modules.items():
        parts = dotted.split("__")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules or end == len(parts):
                module = types.ModuleType(parent)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, parent, module)
        vars(module).update(content)
    spec = importlib.util.spec_from_file_location(f"client_{name}", CLIENTS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def conversation(*texts: str, answer: str | None = None) -> list[dict[str, Any]]:
    """A user's turn: "<image>" among the texts is the receipt."""
    parts = [{"type": "image", "image": RECEIPT} if t == "<image>" else {"type": "text", "text": t} for t in texts]
    turns = [{"role": "user", "content": parts}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def our_ids(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]


# --- VLMEvalKit: vlmeval/vlm/base.py, restated at e8e78f0 ---


class BaseModel:
    allowed_types = ("text", "image", "video")

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)


def test_vlmevalkit_gets_the_right_answer_where_internvls_tiles_give_a_wrong_one(nano, monkeypatch):
    module = adapter("vlmevalkit", monkeypatch, vlmeval__vlm__base={"BaseModel": BaseModel})
    model = module.NemotronNanoVL(str(nano), dtype="float32", device_map="cpu", max_new_tokens=16)
    message = [{"type": "image", "value": str(RECEIPT)}, {"type": "text", "value": QUESTION}]
    assert model.generate(message, dataset="OCRBench") == ANSWER
    turns = [
        {"role": "user", "content": message},
        {"role": "assistant", "content": [{"type": "text", "value": ANSWER}]},
    ]
    again = [*turns, {"role": "user", "content": [{"type": "text", "value": QUESTION}]}]
    assert isinstance(model.chat_inner(again), str)
    with pytest.raises(ValueError, match="video"):
        model.generate([{"type": "video", "value": "film.mp4"}])


def test_vlmevalkit_passes_its_tile_limit_and_options_on(nano, monkeypatch, tmp_path):
    module = adapter("vlmevalkit", monkeypatch, vlmeval__vlm__base={"BaseModel": BaseModel})
    model = module.NemotronNanoVL(str(nano), max_num_tiles=1, dtype="float32", device_map="cpu", max_new_tokens=2)
    seen = {}
    monkeypatch.setattr(model.model, "generate", lambda **kwargs: seen.update(kwargs) or kwargs["input_ids"])
    Image.new("RGB", (400, 900)).save(tmp_path / "tall.png")  # two tiles, if nothing limits them
    model.generate([{"type": "image", "value": str(tmp_path / "tall.png")}, {"type": "text", "value": QUESTION}])
    assert len(seen["pixel_values"]) == 1 and seen["max_new_tokens"] == 2 and seen["do_sample"] is False


# --- Ray Data ---


def test_ray_data_worker_answers_a_batch(nano):
    reader = adapter("ray_data").Reader(str(nano), QUESTION, max_new_tokens=16)
    batch = reader({"path": [str(RECEIPT)] * 2, "page": [1, 2]})
    assert batch == {"path": [str(RECEIPT)] * 2, "page": [1, 2], "answer": [ANSWER] * 2}


# --- docling: docling/models/vlm_pipeline_models/hf_transformers_model.py, restated at 2.143.0 ---


def test_docling_leaves_no_token_of_the_end_in_the_markdown(nano, processor):
    options = adapter("docling_markdown").model_options(nano, prompt=QUESTION)
    model = AutoModel.from_pretrained(nano, **REMOTE).eval()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options["prompt"]}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.open(RECEIPT)], return_tensors="pt", padding=True)
    new_ids = model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
    keys = {"skip_special_tokens", "clean_up_tokenization_spaces", "spaces_between_special_tokens"}
    decoding = {name: value for name, value in options["extra_generation_config"].items() if name in keys}
    assert processor.batch_decode(new_ids, **decoding) == [ANSWER]
    assert processor.batch_decode(new_ids) == [f"{ANSWER}<|eot_id|>"]  # what docling does without the option
    assert options["repo_id"] == nano.name


def test_docling_asks_a_server_what_tools_read_asks(nano, tiny_checkpoint, monkeypatch):
    docling = adapter("docling_markdown")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    options = docling.server_options(nano, "http://localhost:8000/v1/", "nano", timeout=60)
    assert options["url"] == "http://localhost:8000/v1/chat/completions" and options["timeout"] == 60
    assert options["headers"] == {"Authorization": "Bearer secret"} and options["params"]["model"] == "nano"
    assert options["prompt"] == page_prompt_of(AutoConfig.from_pretrained(nano, **REMOTE)) == "Transcribe the page."
    assert docling.page_prompt(tiny_checkpoint) == PAGE_PROMPT  # a config without words of its own


def test_docling_sends_a4_with_the_pixels_of_its_tiles():
    options = adapter("docling_markdown").PAGE_SIZE
    rows, columns = select_tile_grid(1754, 1240)  # at 150 dpi
    sent = [round(min(options["scale"], options["max_size"] / 842) * side) for side in (842, 595)]  # docling's rule
    assert select_tile_grid(*sent) == (rows, columns) == (4, 3)
    assert sent[0] >= 512 * rows and sent[1] / (512 * columns) > 0.95


def test_docling_gets_no_latex_tables_and_keeps_lines():
    answer = "Seller\nTotal\n\n\\begin{tabular}{lr}\nVase & 1 \\\\\nPen & 2 \\\\\n\\end{tabular}\nEnd"
    written = adapter("docling_markdown").to_markdown(answer)
    assert written.startswith("Seller  \nTotal\n\n| Vase | 1 |") and "tabular" not in written


# --- LLaMA-Factory: llamafactory/data/mm_plugin.py and template.py, restated at 0.9.5 ---


class BasePlugin:
    image_token = "<image>"

    def _validate_input(self, processor, images, videos, audios):
        assert processor is not None

    _validate_messages = _validate_input

    def _regularize_images(self, images, image_max_pixels, image_min_pixels):
        return {"images": [Image.open(image).convert("RGB") for image in images]}


def llama_factory(monkeypatch) -> tuple[Any, dict[str, Any]]:
    """The plugin, and what was registered."""
    registered: dict[str, Any] = {}
    llama3 = types.SimpleNamespace(format_user=1, format_assistant=2, format_system=3, format_prefix=4)
    module = adapter(
        "llama_factory",
        monkeypatch,
        llamafactory__data__mm_plugin={
            "IMAGE_PLACEHOLDER": "<image>",
            "BasePlugin": BasePlugin,
            "get_mm_plugin": lambda name, image_token: (name, image_token),
            "register_mm_plugin": lambda name, plugin: registered.update({name: plugin}),
        },
        llamafactory__data__template={
            "TEMPLATES": {"llama3": llama3},
            "register_template": lambda name, **options: registered.update({f"{name} template": options}),
        },
        llamafactory__model__model_utils__visual={
            "_register_composite_model": lambda name, **parts: registered.update({name: parts})
        },
        llamafactory__train__tuner={"run_exp": None},
    )
    return module.NemotronVLPlugin(), registered


@pytest.mark.parametrize(("text", "parts"), TEXTS)
def test_llama_factory_writes_the_prompt_of_our_template(processor, monkeypatch, text, parts):
    plugin, _ = llama_factory(monkeypatch)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
    images = [RECEIPT] * text.count("<image>")
    user, assistant = (m["content"] for m in plugin.process_messages(messages, images, [], [], processor))
    header, end = "<|start_header_id|>%s<|end_header_id|>\n\n", "<|eot_id|>"
    prompt = "<|begin_of_text|>" + header % "user" + user + end + header % "assistant" + assistant + end
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids == our_ids(processor, conversation(*parts, answer=ANSWER))
    assert messages[0]["content"] == text
    tiles = plugin.get_mm_inputs(images, [], [], [len(images)], [0], [0], [ids], processor)
    assert tiles.keys() == ({"pixel_values"} if images else set())


def test_llama_factory_knows_the_parts_of_the_model(nano, monkeypatch):
    _, registered = llama_factory(monkeypatch)
    model = AutoModel.from_pretrained(nano, **REMOTE)
    parts = registered[model.config.model_type]
    assert all(hasattr(model, name) for names in parts.values() for name in names)
    assert registered["nemotron_vl template"]["mm_plugin"] == ("nemotron_vl", "<image>")


# --- ms-swift: swift/template/base.py, restated at 4.6.0 ---


class Template:
    def __init__(self, processor):
        self.processor = processor

    def _encode(self, inputs):
        ids: list[int] = []

        def add(text: str) -> None:
            ids.extend(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

        add("<|begin_of_text|>")
        for message in inputs.messages:
            first, *others = message["content"].split("<image>")
            head = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{first}"
            for index, after in enumerate(others):
                for piece in self.replace_tag("image", index, inputs):
                    if isinstance(piece, str):
                        head += piece
                    else:
                        add(head)
                        ids.extend(piece)
                        head = ""
                head += after
            add(f"{head}<|eot_id|>")
        return {"input_ids": ids, "labels": list(ids), "loss_scale": None}

    @staticmethod
    def _extend_tokens(input_ids, labels, loss_scale, places, get_new_tokens):
        for image, place in reversed(list(enumerate(places))):
            new_ids = get_new_tokens(image)
            input_ids = input_ids[:place] + new_ids + input_ids[place + 1 :]
            labels = labels[:place] + [-100] * len(new_ids) + labels[place + 1 :]
        return input_ids, labels, loss_scale


def ms_swift(monkeypatch) -> Any:
    def accept(*args, **kwargs):
        return args, kwargs

    names = ("Model", "ModelGroup", "ModelLoader", "ModelMeta", "MultiModelKeys", "register_model")
    return adapter(
        "ms_swift",
        monkeypatch,
        swift__model=dict.fromkeys((*names, "register_model_arch"), accept),
        swift__template={"Template": Template, "register_template": accept},
        swift__template__templates__llama={"Llama3TemplateMeta": accept},
    ).NemotronVLTemplate


@pytest.mark.parametrize(("text", "parts"), TEXTS)
def test_ms_swift_writes_the_prompt_of_our_template(processor, monkeypatch, text, parts):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
    inputs = types.SimpleNamespace(messages=messages, images=[RECEIPT] * text.count("<image>"))
    template = ms_swift(monkeypatch)(processor)
    encoded = template._encode(inputs)
    assert encoded["input_ids"] == our_ids(processor, conversation(*parts, answer=ANSWER))
    learned = torch.tensor(encoded["labels"]) != -100
    assert not any(torch.tensor(encoded["input_ids"])[learned] == processor.image_token_id)
    if inputs.images:
        assert torch.equal(encoded["pixel_values"], processor.image_processor(inputs.images)["pixel_values"])
    with pytest.raises(ValueError, match="takes images, not video"):
        template.replace_tag("video", 0, inputs)


@pytest.mark.parametrize("name", ["docling_markdown", "llama_factory", "ray_data"])
def test_commands_without_their_client_say_how_to_run_and_what_to_install(name):
    command = [sys.executable, str(CLIENTS / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert "pip install" in said and f"python examples/clients/{name}.py" in said and "Traceback" not in said


# --- the clients themselves ---


def run(folder: Path, *command: str) -> str:
    """Run a command of a client in `folder`; return what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def needs(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{name} is absent: docs/clients.md has its pip install")


def rows() -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": ANSWER}]
    return [{"messages": messages, "images": [str(RECEIPT)]}] * 2


@pytest.mark.slow
def test_ray_data_runs(nano, tmp_path):
    needs("ray", "Ray Data")
    command = [sys.executable, str(CLIENTS / "ray_data.py"), str(nano), QUESTION, *[str(RECEIPT)] * 3]
    run(tmp_path, *command, "--out", str(tmp_path / "out"), "--workers", "2", "--batch-size", "2")
    answers = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
    assert [answer["answer"] for answer in answers] == [ANSWER] * 3


@pytest.mark.slow
def test_docling_runs(nano, tmp_path):
    needs("docling", "docling")
    markdown = run(tmp_path, sys.executable, str(CLIENTS / "docling_markdown.py"), str(nano), str(RECEIPT))
    assert f"Total {ANSWER}" in [line.strip() for line in markdown.splitlines()] and "<|" not in markdown


@pytest.mark.slow
def test_ms_swift_trains(nano, tmp_path):
    needs("swift", "ms-swift")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    options = {
        **{"custom_register_path": CLIENTS / "ms_swift.py", "model_type": "nemotron_vl", "model": nano},
        **{"dataset": "rows.jsonl", "tuner_type": "lora", "target_modules": "all-linear", "output_dir": "out"},
        **{"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "torch_dtype": "float32"},
    }
    command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    run(tmp_path, sys.executable, "-m", "swift.cli.main", "sft", *command, "--report_to", "none")
    log = next((tmp_path / "out").rglob("logging.jsonl")).read_text().splitlines()
    losses = [float(line["loss"]) for line in map(json.loads, log) if "loss" in line]
    assert len(losses) == 2 and max(losses) < 0.01  # nano knows the answer, if prompt and tiles are as in its training


@pytest.mark.slow
def test_llama_factory_trains(nano, tmp_path):
    needs("llamafactory", "LLaMA-Factory")
    (tmp_path / "rows.json").write_text(json.dumps(rows()))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    mine = {"file_name": "rows.json", "formatting": "sharegpt", "tags": tags}
    mine["columns"] = {"messages": "messages", "images": "images"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": mine}))
    options = {
        **{"model_name_or_path": str(nano), "trust_remote_code": True, "template": "nemotron_vl", "stage": "sft"},
        **{"do_train": True, "finetuning_type": "lora", "lora_target": "all", "dataset_dir": ".", "dataset": "mine"},
        **{"cutoff_len": 4096, "output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2},
        **{"logging_steps": 1, "report_to": "none"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(options))  # JSON is YAML
    run(tmp_path, sys.executable, str(CLIENTS / "llama_factory.py"), "config.yaml")
    log = (tmp_path / "out/trainer_log.jsonl").read_text().splitlines()
    losses = [float(line["loss"]) for line in map(json.loads, log) if "loss" in line]
    assert len(losses) == 2 and max(losses) < 0.01
