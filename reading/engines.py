"""Where pages are read: by a model in this process, by an OpenAI-compatible server, or by workers of Ray.

All of them ask the same of the same image of a page. `Transformers`, `VLLM` and `ChatServer` answer about images
(`Backend`); `InProcess`, `Server` and `RayWorkers` bring the pages of documents to them (`run.Engine`).
"""

import base64
import contextlib
import io
import itertools
import json
import math
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from nemotron_vl.answers import LoopCriteria, confidence
from nemotron_vl.image_processing import count_tiles
from nemotron_vl.tools.weights import fingerprint
from PIL import Image

from .extraction import INSTRUCTIONS, ExtractionError, PageValues, extract, page_values
from .extraction import STATUSES as STATUS_OF
from .inputs import Source
from .pages import PAGE_PROMPT, Answer, Backend, Outcome, Page, PageImage, PageReader, Row, Task, Wanted, pages_of
from .schema import Fields

# Of vLLM: without it, a model may fill a whole answer with spaces between values.
NO_SPACES = {"backend": "xgrammar", "disable_any_whitespace": True}
MAX_NUM_BLOCKS = 1000  # that Ray cuts the list of documents into
IMAGE_MARKS = 4  # tokens before and behind the image of a page


def page_prompt_of(config: Any) -> str:
    """Return what asks a checkpoint for the whole page: its own words, from its config, or `PAGE_PROMPT`."""
    tasks = getattr(config, "task_specific_params", None) or {}
    return tasks.get("markdown", {}).get("prompt", PAGE_PROMPT)


def describe_backend(backend: Any, config: Any, processor: Any) -> None:
    """Give a backend what its checkpoint says about pages."""
    backend.processor, backend.tiling = processor, processor.image_processor.tiling
    backend.window, backend.tokens_per_tile = config.max_sequence_length, processor.tokens_per_tile
    backend.page_prompt = page_prompt_of(config)


def confidence_temperature_of(directory: Path) -> float:
    """Return the temperature that a checkpoint's confidences were fitted with; 1 changes nothing."""
    file = directory / "generation_config.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return stored.get("confidence_temperature") or 1.0


def load_processor(directory: Path) -> tuple[Any, Any]:
    """Return config and processor of a checkpoint directory, without its weights.

    The classes are those of this package; a vLLM directory is not asked for its code.
    """
    from nemotron_vl.configuration_nemotron_vl import NemotronVLConfig, NemotronVLV2Config
    from nemotron_vl.processing_nemotron_vl import NemotronVLProcessor, NemotronVLV2Processor

    stored = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    is_v2 = stored.get("model_type") == NemotronVLV2Config.model_type
    config = (NemotronVLV2Config if is_v2 else NemotronVLConfig).from_pretrained(directory)
    return config, (NemotronVLV2Processor if is_v2 else NemotronVLProcessor).from_pretrained(directory)


def messages_for(url: str, prompt: str) -> list[dict[str, Any]]:
    """Return the conversation that asks about a page, in OpenAI's form: the image, then the text, as in training."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]


def data_url(image: Image.Image) -> str:
    """Return an image as a PNG in a `data:` URL; nothing is lost."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def room_for_answer(backend: Backend, prompt: str, num_tiles: int, task: Task) -> int:
    """Return how many tokens an answer about one image may have: those of the task, at most what the context leaves.

    Raises:
        ValueError: if it leaves none.
    """
    rendered = backend.processor.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    num_tokens = len(rendered["input_ids"][0]) + backend.tokens_per_tile * num_tiles + IMAGE_MARKS
    if num_tokens >= backend.window:
        raise ValueError(
            f"A page of {num_tiles} tiles makes a prompt of {num_tokens} tokens, and the context of {backend.window} tokens "
            "holds prompt and answer. Lower max_num_tiles, or take 'fit'."
        )
    return min(task.max_new_tokens, backend.window - num_tokens)


def without_end(tokens: list[Any], finish_reason: str) -> list[Any]:
    """Return the tokens that spell an answer of vLLM, which lists the one that ends it, too."""
    return tokens[:-1] if finish_reason == "stop" else tokens


def finished_answer(
    backend: Any, text: str, num_tokens: int, finish_reason: str, task: Task, probabilities: Any = None
) -> Answer:
    """Return the answer of an engine that knows no loops: the rule is applied to the whole answer, and cuts it."""
    tokenizer, more = backend.processor.tokenizer, {}
    if probabilities is not None:
        more["confidence"] = confidence(probabilities, backend.temperature)
    if task.stop_loops and task.schema is None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        loops = LoopCriteria(tokenizer)
        lengths = range(1, len(ids) + 1)
        end = next((length for length in lengths if loops(torch.tensor([ids[:length]]), None)[0]), None)
        if end is not None:
            return Answer(tokenizer.decode(ids[:end], skip_special_tokens=True).strip(), end, "looped", more)
    return Answer(text.strip(), num_tokens, "cut off" if finish_reason == "length" else "read", more)


def fields_answer(found: PageValues, num_tokens: int) -> Answer:
    """Return what was read of the fields of a page, with the confidence of each value by its path."""
    more = {
        "fields": plain_tree(found.tree),
        "confidence": {path: value.confidence for path, value in found.values.items()},
    }
    return Answer(found.answer, num_tokens, found.status, more)


def plain_tree(tree: Any) -> Any:
    """Return the values of a tree of `Value`s."""
    if isinstance(tree, dict):
        return {name: plain_tree(part) for name, part in tree.items()}
    return [plain_tree(part) for part in tree] if isinstance(tree, list) else tree.value


def schema_prompt(fields: Fields, is_only_page: bool) -> tuple[dict[str, Any], str]:
    """Return the schema that an answer about a page is held to, and the text that asks for it."""
    asked = fields.asked if is_only_page else fields.for_one_of_several_pages()
    return asked, f"{INSTRUCTIONS}\n\n{json.dumps(asked, ensure_ascii=False)}"


# --- what answers about images ---


class Transformers:
    """A model in this process.

    Args:
        model, processor: of a checkpoint.
        name: of the model in the rows; by default the last part of the path that it was loaded from.
    """

    def __init__(self, model: Any, processor: Any, name: str | None = None):
        self.model = model
        self.name = name or Path(model.name_or_path).name or type(model).__name__
        describe_backend(self, model.config, processor)

    @classmethod
    def load(cls, directory: Path, **options: Any) -> "Transformers":
        """Load a checkpoint directory; `options` are arguments of `AutoModel.from_pretrained`."""
        from nemotron_vl.tools.chat import load
        from nemotron_vl.tools.threads import choose_threads

        model, processor = load(directory, **options)
        choose_threads(model)
        return cls(model, processor, directory.resolve().name)

    def answer(self, images: list[PageImage], prompt: str | None, task: Task) -> list[Answer]:
        if task.schema is not None:
            return [self._read_fields(image, task) for image in images]
        rooms = [room_for_answer(self, prompt, image.num_tiles, task) for image in images]
        cut = [
            self.processor.image_processor(page.image, return_tensors="pt", max_num_tiles=page.max_num_tiles)
            for page in images
        ]
        answers = self.model.chat(
            self.processor,
            question=[prompt] * len(images),
            generation_config={"max_new_tokens": min(rooms), "do_sample": False},
            return_dict=True,
            return_confidence=task.confidence,
            stop_loops=task.stop_loops,
            pixel_values=torch.cat([tiles["pixel_values"] for tiles in cut]),
            num_patches=torch.cat([tiles["num_patches"] for tiles in cut]),
        )
        return [
            Answer(
                answer.text,
                len(answer.token_ids) + (answer.finish_reason == "stop"),
                STATUS_OF[answer.finish_reason],
                {"confidence": answer.confidence} if task.confidence else {},
            )
            for answer in answers
        ]

    def _read_fields(self, page: PageImage, task: Task) -> Answer:
        """Read what one page has of the fields; other pages may have what it lacks."""
        fields = Fields.of(task.schema)
        asked, text = schema_prompt(fields, page.is_only_page)
        room = room_for_answer(self, text, page.num_tiles, task)
        try:
            found = extract(
                self.model,
                self.processor,
                page.image,
                Fields(fields.schema, asked, fields.build),
                max_new_tokens=room,
                stop_loops=task.stop_loops,
                max_num_tiles=page.max_num_tiles,
            ).pages
        except ExtractionError as error:  # the whole document has to be valid, and not each page
            found = error.pages
        return fields_answer(found[0], found[0].tokens)


class VLLM:
    """vLLM in this process: many pages at once, on a GPU.

    Args:
        directory: of a checkpoint, with our code beside it.
        options: of `vllm.LLM`.
    """

    def __init__(self, directory: Path, **options: Any):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(f"vLLM is not installed: pip install vllm. {error}") from error
        config, processor = load_processor(directory)
        self.name = directory.resolve().name
        describe_backend(self, config, processor)
        self.temperature = confidence_temperature_of(Path(directory))
        options = {
            "max_model_len": config.max_sequence_length,
            "limit_mm_per_prompt": {"image": 1},
            "structured_outputs_config": NO_SPACES,
            **options,
        }
        self._llm = LLM(str(directory), trust_remote_code=True, **options)

    def answer(self, images: list[PageImage], prompt: str | None, task: Task) -> list[Answer]:
        from vllm import SamplingParams

        if len({image.max_num_tiles for image in images}) > 1:  # it is an option of all images of a call
            return [answer for image in images for answer in self.answer([image], prompt, task)]
        conversations, options = [], []
        for image in images:
            limits = {"temperature": 0, "logprobs": 0 if task.confidence else None}
            text = prompt
            if task.schema is not None:
                from vllm.sampling_params import StructuredOutputsParams

                asked, text = schema_prompt(Fields.of(task.schema), image.is_only_page)
                limits["structured_outputs"] = StructuredOutputsParams(json=asked)
            limits["max_tokens"] = room_for_answer(self, text, image.num_tiles, task)
            options.append(SamplingParams(**limits))
            conversations.append(messages_for(data_url(image.image), text))
        max_num_tiles = images[0].max_num_tiles
        tiles = None if max_num_tiles == self.tiling.max_num_tiles else {"max_num_tiles": max_num_tiles}
        outputs = self._llm.chat(conversations, options, use_tqdm=False, mm_processor_kwargs=tiles)
        return [self._answer_of(output.outputs[0], task) for output in outputs]

    def _answer_of(self, output: Any, task: Task) -> Answer:
        num_tokens = len(output.token_ids)
        if task.schema is not None:
            return fields_answer(page_values(output.text, 1, output.finish_reason, num_tokens), num_tokens)
        probabilities = None
        if task.confidence:
            chosen = without_end(list(zip(output.token_ids, output.logprobs, strict=True)), output.finish_reason)
            probabilities = [math.exp(logprobs[token].logprob) for token, logprobs in chosen]
        return finished_answer(self, output.text, num_tokens, output.finish_reason, task, probabilities)


class ChatServer:
    """An OpenAI-compatible server: `tools.serve`, vLLM, or another that takes images.

    Args:
        url: its address, such as http://localhost:8000/v1.
        directory: of the server's checkpoint here, without its weights if you like. Its configs and tokenizer say how
            pages are cut into tiles, and how the whole page is asked for.
        name: of the model there; None takes the only one that the server has.

    The environment variable OPENAI_API_KEY is sent along.
    """

    def __init__(self, url: str, directory: str | os.PathLike, name: str | None = None):
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"Reading by a server needs a package: pip install openai. {error}") from error
        config, processor = load_processor(Path(directory))
        describe_backend(self, config, processor)
        self.temperature = confidence_temperature_of(Path(directory))
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=5, timeout=3600)
        try:
            models = {model.id: model for model in self._client.models.list()}
        except openai.OpenAIError as error:
            raise ValueError(f"{url} does not answer as an OpenAI-compatible server: {error}") from error
        if name is None and len(models) != 1:
            raise ValueError(f"{url} has the models {', '.join(models) or '(none)'}. Say which one is to read.")
        self.name = name or next(iter(models))
        if self.name not in models:
            raise ValueError(f"{url} has no model {self.name!r}, but {', '.join(models)}.")
        self.is_vllm = models[self.name].owned_by == "vllm"

    def answer(self, images: list[PageImage], prompt: str | None, task: Task) -> list[Answer]:
        return [self._answer(image, prompt, task) for image in images]

    def _answer(self, page: PageImage, prompt: str | None, task: Task) -> Answer:
        import openai

        options, more = {}, {}
        if task.schema is not None:
            asked, prompt = schema_prompt(Fields.of(task.schema), page.is_only_page)
            schema = {"name": "fields", "schema": asked, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        if task.confidence:
            options["logprobs"] = True
        if count_tiles(page.image.height, page.image.width, self.tiling) != page.num_tiles:
            more["mm_processor_kwargs" if self.is_vllm else "chat_template_kwargs"] = {
                "max_num_tiles": page.max_num_tiles
            }
        try:
            completion = self._client.chat.completions.create(
                model=self.name,
                messages=messages_for(data_url(page.image), prompt),
                temperature=0,
                max_tokens=room_for_answer(self, prompt, page.num_tiles, task),
                extra_body=more,
                **options,
            )
        except openai.APIStatusError as error:  # it refuses this page; without a connection it can read none
            raise ValueError(f"The server refused the page: {error}") from error
        choice, num_tokens = completion.choices[0], completion.usage.completion_tokens
        text = choice.message.content or ""
        if task.schema is not None:
            return fields_answer(page_values(text, 1, choice.finish_reason, num_tokens), num_tokens)
        probabilities = None
        if task.confidence:
            chosen = choice.logprobs.content
            chosen = without_end(chosen, choice.finish_reason) if self.is_vllm else chosen
            probabilities = [math.exp(token.logprob) for token in chosen]
        return finished_answer(self, text, num_tokens, choice.finish_reason, task, probabilities)


# --- what brings pages to them ---


def wanted_pages(
    documents: Iterable[Wanted], task: Task, limit: int | None, should_stop: Callable[[], bool]
) -> Iterator[Page | Outcome]:
    """Yield the pages of all documents, at most `limit`, until `should_stop`."""
    num_pages = 0
    for wanted in documents:
        for page in pages_of(wanted, task):
            if should_stop() or num_pages == limit:
                return
            num_pages += isinstance(page, Page)
            yield page


class InProcess:
    """Reads in this process, `batch_size` pages at once.

    Args:
        backend: a loaded model.
        batch_size: pages that go through the model together. More are faster on a GPU and take more memory.
        weights: digest of the weights, for a run to compare; None compares names only.
    """

    def __init__(self, backend: Backend, batch_size: int = 1, weights: str | None = None):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.backend, self.batch_size = backend, batch_size
        self.settings = {"model": backend.name, "weights": weights}

    @classmethod
    def load(
        cls, directory: str | os.PathLike, batch_size: int = 1, use_vllm: bool = False, **options: Any
    ) -> "InProcess":
        """Load a checkpoint directory, by transformers or by vLLM; `options` are theirs."""
        directory = Path(directory)
        backend = VLLM(directory, **options) if use_vllm else Transformers.load(directory, **options)
        return cls(backend, batch_size, fingerprint(directory))

    def read(
        self, documents: Iterable[Wanted], task: Task, limit: int | None, should_stop: Callable[[], bool]
    ) -> Iterator[Outcome]:
        return self.read_pages(wanted_pages(documents, task, limit, should_stop), task)

    def read_pages(self, pages: Iterable[Page | Outcome], task: Task) -> Iterator[Outcome]:
        """Yield the outcome of each page; what is an outcome already goes through."""
        with contextlib.closing(PageReader(self.backend, task)) as reader:
            pages = iter(pages)
            while batch := list(itertools.islice(pages, self.batch_size)):
                rows = iter(reader([page for page in batch if isinstance(page, Page)]))
                for page in batch:
                    yield page if isinstance(page, Outcome) else Outcome(page.file, next(rows), page.num_wanted)


class Server:
    """Reads by a server, with `concurrency` requests at once; the pages are rendered here.

    Args:
        backend: the server.
        concurrency: requests that wait for an answer at the same time.
    """

    def __init__(self, backend: ChatServer, concurrency: int = 8):
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}.")
        self.backend, self.concurrency = backend, concurrency
        self.settings = {"model": backend.name, "weights": None}

    def read(
        self, documents: Iterable[Wanted], task: Task, limit: int | None, should_stop: Callable[[], bool]
    ) -> Iterator[Outcome]:
        reader = PageReader(self.backend, task)
        waiting: deque[tuple[Page | Outcome, Row | None, Future | None]] = deque()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for page in wanted_pages(documents, task, limit, should_stop):
                row, image = (None, None) if isinstance(page, Outcome) else reader.prepare(page)
                future = None if image is None else pool.submit(reader.answer_alone, row, image)
                waiting.append((page, row, future))
                while len(waiting) >= 2 * self.concurrency or (waiting and _is_ready(waiting[0][2])):
                    yield _outcome(*waiting.popleft())
            while waiting:
                yield _outcome(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            reader.close()


def _is_ready(future: Future | None) -> bool:
    return future is None or future.done()


def _outcome(page: Page | Outcome, row: Row | None, future: Future | None) -> Outcome:
    if isinstance(page, Outcome):
        return page
    if future is not None:
        future.result()
    return Outcome(page.file, row, page.num_wanted)


class RayWorkers:
    """Reads by workers of Ray Data: copies of the model in processes of their own, on one machine or many.

    The documents are Ray's data set: its tasks open them, and its workers read their pages. How many pages wait, and
    what happens to the pages of a worker that dies, is Ray's affair: it starts the worker again and repeats its pages.
    Checkpoint and documents lie on a disk that all machines share, and this package is installed on each.

    Args:
        directory: of a checkpoint.
        batch_size: pages that go through a worker's model together.
        use_vllm: hold the model by vLLM instead of transformers.
        workers: copies of the model.
        cpus, gpus: of each worker.
        options: of `AutoModel.from_pretrained`, or of `vllm.LLM`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        batch_size: int = 1,
        use_vllm: bool = False,
        *,
        workers: int = 1,
        cpus: float = 1,
        gpus: float = 0,
        **options: Any,
    ):
        if workers < 1 or batch_size < 1:
            raise ValueError(f"workers and batch_size must be at least 1, got {workers} and {batch_size}.")
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise ImportError(f"Ray Data is not installed: pip install 'ray[data]'. {error}") from error
        self.directory = Path(directory).resolve()
        self.engine = {"directory": self.directory, "batch_size": batch_size, "use_vllm": use_vllm, **options}
        self.batch_size = batch_size
        self.workers, self.resources = workers, {"num_cpus": cpus, "num_gpus": gpus}
        self.settings = {"model": self.directory.name, "weights": fingerprint(self.directory)}

    def read(
        self, documents: Iterable[Wanted], task: Task, limit: int | None, should_stop: Callable[[], bool]
    ) -> Iterator[Outcome]:
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="WARNING")
        documents = list(documents)
        files = {os.path.abspath(wanted.source.file): wanted.source.file for wanted in documents}
        items = [
            {"document": pickle.dumps((os.path.abspath(source.file), source.name, source.error, done))}
            for source, done in documents
        ]
        if not items or limit == 0:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_options.preserve_order = True  # so that the pages of a document follow each other
        open_documents, worker = _remote_parts(str(Path(__file__).resolve().parents[1]))
        read = (
            ray.data.from_items(items, override_num_blocks=min(len(items), MAX_NUM_BLOCKS))
            .flat_map(open_documents, fn_kwargs={"task": asdict(task)})
            .repartition(target_num_rows_per_block=self.batch_size)  # what Ray hands out, and repeats, at once
            .map_batches(
                worker,
                fn_constructor_args=(self.engine, asdict(task)),
                batch_size=self.batch_size,
                compute=ray.data.ActorPoolStrategy(size=self.workers),
                **self.resources,
            )
        )
        num_pages = 0
        for item in read.iter_rows():
            file, row, num_wanted = pickle.loads(item["outcome"])
            file = files[file]
            yield Outcome(file, None if row is None else {**row, "file": file}, num_wanted)
            num_pages += row is not None
            if num_pages == limit or should_stop():
                return


def _remote_parts(root: str) -> tuple[Callable, type]:
    """Return what Ray's tasks and workers run. Ray sends it by value, because it is defined in here.

    Args:
        root: the folder of this package, which a worker on this machine takes its code from.
    """

    def code_of_this_package() -> Any:
        import importlib
        import os
        import sys
        import types

        if "nemotron_vl" not in sys.modules and os.path.isdir(root):  # as in `tools`; otherwise it is installed
            sys.modules["nemotron_vl"] = types.ModuleType("nemotron_vl")
            sys.modules["nemotron_vl"].__path__ = [root]
        return importlib.import_module("nemotron_vl.reading.engines")

    def open_documents(item: dict[str, Any], task: dict[str, Any]) -> list[dict[str, Any]]:
        pages = code_of_this_package().pages_of_values(pickle.loads(item["document"]), task)
        return [{"page": pickle.dumps(page)} for page in pages]

    class Worker:
        def __init__(self, engine: dict[str, Any], task: dict[str, Any]):
            self.read = code_of_this_package().reader_of_values(engine, task)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"outcome": [pickle.dumps(values) for values in self.read(map(pickle.loads, batch["page"]))]}

    return open_documents, Worker


def pages_of_values(document: tuple, task: dict[str, Any]) -> Iterator[tuple]:
    """`pages_of` for Ray, which carries plain values."""
    *source, done = document
    return map(tuple, pages_of(Wanted(Source(*source), done), Task(**task)))


def reader_of_values(engine: dict[str, Any], task: dict[str, Any]) -> Callable[[Iterable[tuple]], Iterator[tuple]]:
    """Load a model; return a function from pages to their outcomes, both as plain values."""
    loaded = InProcess.load(**engine)
    kinds = {len(kind._fields): kind for kind in (Page, Outcome)}
    return lambda pages: map(tuple, loaded.read_pages((kinds[len(values)](*values) for values in pages), Task(**task)))
