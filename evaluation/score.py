"""Score a checkpoint on the benchmarks of its model card, and print the table beside the card's numbers.

    python -m evaluation.score path/to/8b                             # the whole table of the card
    python -m evaluation.score path/to/8b --tasks docvqa ocrbench     # some benchmarks
    python -m evaluation.score path/to/8b --tasks docvqa --limit 8    # a try on 8 samples
    python -m evaluation.score --answers scores/8b --tasks docvqa     # count kept answers again, without a model
    python -m evaluation.score --compare scores/8b scores/8b-nvfp4    # the difference of two runs, sample by sample

lmms-eval loads the data and asks the model; this command adds NVIDIA's prompts, the official rules where lmms-eval's
differ, answers that are kept as they come, and the table. A repeated command goes on where the last one stopped. The
last line of the output is one JSON object. The exit status is 1 if a benchmark has no result. docs/evaluation.md has
the installation, the hours to expect and what the numbers can be compared with.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation import ROOT
from evaluation.answers import AnswerFile, KeepsAnswers, files_digest
from evaluation.scorers import CATEGORY_OF_TYPE, ocrbench_v2_overall
from evaluation.tables import paired_difference, table
from evaluation.tasks.utils import STYLES
from tools.command_line import prepare, progress, require_checkpoint, require_directory, sentence_of
from tools.weights import fingerprint

TASKS_FOLDER = Path(__file__).parent / "tasks"
INSTALL = "docs/evaluation.md has the command that installs what evaluation.score needs"
SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class Benchmark:
    """What the table says of a benchmark: its name, its rule, and the cards' scores in per cent by model."""

    title: str
    rule: str
    card: dict[str, float]
    note: str = ""


BENCHMARKS = {
    "ocrbench": Benchmark("OCRBench", "contains the answer", {"8B": 83.9, "12B": 85.6}),
    "ocrbench_v2": Benchmark("OCRBench v2", "by type of question", {}),
    "docvqa": Benchmark("DocVQA val", "ANLS", {"8B": 91.2, "12B": 94.4}),
    "infovqa": Benchmark("InfoVQA val", "ANLS", {"8B": 76.2}),
    "chartqa": Benchmark("ChartQA test", "within 5 %", {"8B": 86.3, "12B": 89.7}),
    "ai2d": Benchmark("AI2D test", "option, no judge", {"8B": 84.8, "12B": 87.1}),
    "mmmu": Benchmark("MMMU val", "option, no judge", {"8B": 48.2}, "the card used ChatGPT as judge"),
    "videomme": Benchmark("Video-MME", "first letter of A to D", {"8B": 49.2}, "one tile a frame"),
}
OCRBENCH_V2_CARDS = {"en": {"8B": 60.1, "12B": 62.0}, "cn": {"8B": 37.9}}
# The width of the language model tells the published models from smaller ones, which no card describes.
MODELS = {("Llama_Nemotron_Nano_VL", 4096): "8B", ("NemotronH_Nano_VL_V2", 5120): "12B"}


def model_of(config: dict[str, Any]) -> str | None:
    """Return "8B" or "12B" for a config of the published models, None for others."""
    return MODELS.get((config.get("model_type"), config.get("llm_config", {}).get("hidden_size")))


# --- Models ----------------------------------------------------------------------------------------------------------


def transformers_model(folder: Path, arguments: argparse.Namespace) -> Any:
    """Return lmms-eval's `huggingface` model with a checkpoint that has our code beside it."""
    import lmms_eval.models.chat.huggingface as chat
    from accelerate import Accelerator
    from tqdm import tqdm

    # Its bar counts batches; ours counts samples.
    chat.tqdm = lambda *steps, **options: tqdm(*steps, **{**options, "disable": True})

    class OneProcess(Accelerator):
        """Lets each of several processes load the model for itself; otherwise the class wants a GPU for each."""

        num_processes = 1

    chat.Accelerator = OneProcess

    class Transformers(KeepsAnswers, chat.Huggingface):
        @contextlib.contextmanager
        def options_for(self, request: Any) -> Iterator[None]:
            """Share the tiles among the images of a sample, as NVIDIA's own evaluation does."""
            image_processor = self.processor.image_processor
            tiles = image_processor.max_num_tiles
            image_processor.max_num_tiles = max(1, tiles // max(1, request.num_images))
            try:
                yield
            finally:
                image_processor.max_num_tiles = tiles

    accelerator = Accelerator()
    device = arguments.device or (str(accelerator.device) if accelerator.device.type == "cuda" else "cpu")
    batch_size = arguments.batch_size or (1 if device == "cpu" else 8)
    extra = {"attn_implementation": "sdpa"} if device == "cpu" else {}
    model = Transformers(
        pretrained=str(folder),
        device=device,
        device_map=device,
        batch_size=batch_size,
        trust_remote_code=True,
        **extra,
    )
    model.accelerator = accelerator
    if arguments.max_num_tiles is not None:
        model.processor.image_processor.max_num_tiles = arguments.max_num_tiles
    if arguments.upscale is not None:
        model.processor.image_processor.upscale = arguments.upscale
    if arguments.num_frames is not None:
        model.processor.image_processor.num_frames = arguments.num_frames  # films have its options
    return model


def vllm_model(folder: Path, arguments: argparse.Namespace) -> Any:
    """Return lmms-eval's `vllm` model. vLLM cuts the tiles itself, without doubling."""
    from lmms_eval.models.chat.vllm import VLLM

    class Vllm(KeepsAnswers, VLLM):
        @property
        def batch_size(self) -> int:
            return self.batch_size_per_gpu

        @contextlib.contextmanager
        def options_for(self, request: Any) -> Iterator[None]:
            """Hold the task's limit: lmms-eval takes the larger one of the task's and the model's own."""
            self.max_new_tokens = request.args[2]["max_new_tokens"]
            yield

    options = dict(option.split("=", 1) for option in arguments.model_args)
    if arguments.max_num_tiles is not None:
        options["mm_processor_kwargs"] = json.dumps({"max_num_tiles": arguments.max_num_tiles})
    return Vllm(model=str(folder), batch_size=arguments.batch_size or 8, **options)


def no_model() -> Any:
    """Return a model of lmms-eval that has kept answers alone."""
    from lmms_eval.api.model import lmms

    class KeptAnswers(KeepsAnswers, lmms):
        is_simple = False
        batch_size = 1

        def ask(self, group: list) -> None:
            key = group[0][0]
            raise LookupError(
                f"No answer to sample {key.doc_id} of {key.task} with this prompt in the style {key.style!r} is kept. "
                "Score with a checkpoint to ask for it, or count fewer samples with --limit."
            )

        def loglikelihood(self, requests: list) -> list:
            raise NotImplementedError("Answers have no likelihoods.")

        def generate_until_multi_round(self, requests: list) -> list:
            raise NotImplementedError("The tasks here have one question.")

    return KeptAnswers()


@contextlib.contextmanager
def with_code(checkpoint: Path) -> Iterator[Path]:
    """Yield a folder that lmms-eval can load: the checkpoint, or one with links to its weights and our code beside."""
    if (checkpoint / "modeling_nemotron_vl.py").exists():
        yield checkpoint
        return
    from tools.adopt import inspect, write

    with tempfile.TemporaryDirectory(prefix="nemotron-vl-") as folder:
        flat = Path(folder) / checkpoint.resolve().name
        write(inspect(checkpoint), flat)
        yield flat


# --- Scores ----------------------------------------------------------------------------------------------------------


def evaluate(model: Any, task: str, style: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Ask the questions of a benchmark; return lmms-eval's results, on the first process alone."""
    from datasets.config import HF_DATASETS_CACHE
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    # lmms-eval picks a task's options by the name of the model: here, the style of the prompts.
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, model_name=style)
    name = f"nemotron_{task}"
    config: dict[str, Any] = {"task": name}
    if arguments.data:
        data_set = arguments.data / manager._get_config(name)["dataset_path"]
        require_directory(data_set)
        config["dataset_path"] = str(data_set)
        # datasets takes a folder of the same name for the same data, whatever it holds.
        if "dataset_kwargs" in manager._get_config(name):  # nothing to download and unpack
            config["dataset_kwargs"] = {}
            os.environ.setdefault("VIDEOMME_VIDEOS", str(data_set / "data"))
        os.environ["HF_DATASETS_CACHE"] = str(Path(HF_DATASETS_CACHE) / f"nemotron-vl-{files_digest(data_set)}")
    if arguments.max_new_tokens:
        config["generation_kwargs"] = {
            "max_new_tokens": arguments.max_new_tokens,
            "temperature": 0,
            "do_sample": False,
        }
    # As an object: by its name, lmms-eval makes a changed task one that knows no messages.
    task_object = manager.load_task_or_group([config], task_type="chat")[name]
    return simple_evaluate(
        model=model,
        tasks=[task_object],
        task_manager=manager,
        batch_size=model.batch_size,
        limit=arguments.limit,
        bootstrap_iters=0,
        process_docs_parallel=1,  # the official scripts of OCRBench v2 share a working directory
        log_samples=True,
    )


def summarize(task: str, results: dict[str, Any], rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Return the numbers of a benchmark.

    Args:
        task: a key of `BENCHMARKS`.
        results: of lmms-eval.
        rows: the kept answers to this benchmark.
        tokenizer: counts the tokens of an answer; None without a model.

    Returns:
        `samples` and `of`; `score` and its two standard errors `error`, in per cent; how many samples `failed`, were
        `cut` at the limit of tokens, or had a letter `drawn`; for OCRBench v2 `parts` with the same for each language;
        `scores`, each sample's in 0..1.
    """
    name = f"nemotron_{task}"
    samples = {sample["doc_id"]: sample for sample in sorted(results["samples"][name], key=lambda one: one["doc_id"])}
    given = {(row["doc_id"], row["answer"]): row for row in rows}
    counted = [given[doc_id, sample["resps"][0][0]] for doc_id, sample in samples.items()]
    scores = {str(doc_id): float(sample["score"]) for doc_id, sample in samples.items()}
    report: dict[str, Any] = {"samples": len(scores), "of": results["n-samples"][name]["original"], "scores": scores}
    report["failed"] = sum(row["error"] is not None for row in counted)
    report["cut"] = sum(is_cut(row, tokenizer) for row in counted) if tokenizer else None
    report["drawn"] = int(sum(sample.get("drawn", 0) for sample in samples.values()))
    if task == "ocrbench_v2":
        kinds = [sample["doc"]["type"] for sample in samples.values()]
        report["parts"] = ocrbench_v2_parts(list(zip(kinds, scores.values(), strict=True)))
    else:
        report |= mean_and_error(list(scores.values()))
    return report


def is_cut(row: dict[str, Any], tokenizer: Any) -> bool:
    """Say whether an answer has as many tokens as its limit allows, so that it may have been cut off."""
    return len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) >= row["settings"]["max_new_tokens"]


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Return the mean and two standard errors of it, in per cent."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return {"score": 100 * mean, "error": 200 * (variance / len(values)) ** 0.5}


def ocrbench_v2_parts(typed: list[tuple[str, float]]) -> dict[str, Any]:
    """Return the mean of the categories' means and its two standard errors, in per cent, for each language."""
    parts = {}
    for language, numbers in ocrbench_v2_overall(typed).items():
        variance = 0.0
        for name, category in numbers["categories"].items():
            members = [score for kind, score in typed if CATEGORY_OF_TYPE[kind] == (language, name)]
            variance += sum((score - category["score"]) ** 2 for score in members) / len(members) ** 2
        parts[language] = {
            "samples": sum(category["count"] for category in numbers["categories"].values()),
            "score": 100 * numbers["overall"],
            "error": 200 * variance**0.5 / len(numbers["categories"]),
            "categories": {name: round(100 * mean["score"], 2) for name, mean in numbers["categories"].items()},
            "complete": numbers["complete"],
        }
    return parts


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the table: a row for each benchmark and style, two for OCRBench v2."""
    lines = []
    for run in report["runs"]:
        benchmark = BENCHMARKS[run["task"]]
        if "error_text" in run:
            lines.append([benchmark.title, "", "no result", "", "", "", run["style"], run["error_text"]])
            continue
        whole = run["samples"] == run["of"]
        parts = [(benchmark.title, benchmark.card, run)]
        if "parts" in run:
            parts = [
                (f"{benchmark.title} {language}", OCRBENCH_V2_CARDS[language], part)
                for language, part in run["parts"].items()
            ]
        for title, cards, numbers in parts:
            card = cards.get(report["model"] or "")
            complete = whole and numbers.get("complete", True)
            of = "" if whole else f" of {run['of']:,}"
            samples = f"{run['samples']:,}{of}" if "parts" not in run else f"{numbers['samples']:,}{of}"
            lines.append(
                [
                    title,
                    samples,
                    f"{numbers['score']:.1f}",
                    f"{numbers['error']:.1f}",
                    "" if card is None else f"{card:.1f}",
                    f"{numbers['score'] - card:+.1f}" if card is not None and complete else "",
                    run["style"],
                    remarks(run, benchmark, whole, numbers),
                ]
            )
    return lines


def remarks(run: dict[str, Any], benchmark: Benchmark, whole: bool, numbers: dict[str, Any]) -> str:
    """Return what a reader has to know of a number."""
    notes = [benchmark.rule]
    if benchmark.note:
        notes.append(benchmark.note)
    if not whole:
        notes.append("a part of the benchmark: not comparable")
    elif not numbers.get("complete", True):
        notes.append("categories are missing: not comparable")
    for name, text in (("failed", "failed"), ("cut", "at the limit of tokens"), ("drawn", "drawn at random")):
        if run.get(name):
            notes.append(f"{run[name]:,} {text}")
    return "; ".join(notes)


HEADINGS = ("benchmark", "samples", "ours", "± 2 SE", "card", "difference", "prompts", "counted by")


# --- The command -----------------------------------------------------------------------------------------------------


def score(arguments: argparse.Namespace) -> int:
    """Ask, count, and print the table; return the exit status."""
    from loguru import logger

    logger.remove()  # lmms-eval says much; its warnings stay
    logger.add(sys.stderr, level="WARNING")
    rank, _ = processes()
    with contextlib.ExitStack() as stack:
        if arguments.answers:
            model, out = no_model(), arguments.answers
            report = read_report(out)
        else:
            folder = stack.enter_context(with_code(arguments.checkpoint))
            model = {"transformers": transformers_model, "vllm": vllm_model}[arguments.engine](folder, arguments)
            out = arguments.out or ROOT / "scores" / arguments.checkpoint.resolve().name
            report = describe(arguments, folder, model)
            if not rank:
                begin(out, report)
        runs = [attempt(model, out, arguments, task, style) for task in arguments.tasks for style in arguments.styles]
    leave_the_others()
    if rank:
        return 0
    report["runs"] = runs
    if not arguments.answers:
        write_json(out / SCORES_FILE, report)
    print(f"{title_of(report)}\n{table(HEADINGS, table_rows(report))}")
    print(json.dumps(report | {"runs": [{name: run[name] for name in run if name != "scores"} for run in runs]}))
    return int(any("error_text" in run for run in runs))


def describe(arguments: argparse.Namespace, folder: Path, model: Any) -> dict[str, Any]:
    """Return the conditions that are printed beside the numbers; answers of other `conditions` lie in other folders."""
    import torch
    import transformers

    processor = getattr(model, "processor", None)
    if processor is None:
        tiling = {"max_num_tiles": arguments.max_num_tiles or "the checkpoint's number of", "upscale": 1}
    else:
        tiling = {name: getattr(processor.image_processor, name) for name in ("max_num_tiles", "upscale")}
        tiling["num_frames"] = processor.video_processor.num_frames or "default"
    return {
        "checkpoint": arguments.checkpoint.resolve().name,
        "model": model_of(json.loads((folder / "config.json").read_text(encoding="utf-8"))),
        "conditions": {"weights": fingerprint(folder), "engine": arguments.engine} | tiling,
        "versions": {
            "lmms-eval": version("lmms-eval"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "batch_size": model.batch_size,
        "runs": [],
    }


def begin(out: Path, report: dict[str, Any]) -> None:
    """Write what a folder holds answers of; raise ValueError if it already holds others."""
    if (out / SCORES_FILE).exists():
        kept = read_report(out)["conditions"]
        different = [name for name in kept if kept[name] != report["conditions"].get(name)]
        if different:
            changes = ", ".join(
                f"{name}: {kept[name]} there, {report['conditions'].get(name)} now" for name in different
            )
            raise ValueError(
                f"{out} holds answers under other conditions ({changes}). Name another folder with --out."
            )
        report["runs"] = read_report(out)["runs"]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SCORES_FILE, report)


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a folder of answers, for its conditions and for `--compare`."""
    path = folder / SCORES_FILE
    if not path.exists():
        raise ValueError(f"{folder} holds no {SCORES_FILE}, so it is no folder that evaluation.score has written.")
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    partial_file = path.with_suffix(".part")
    partial_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial_file.replace(path)


def title_of(report: dict[str, Any]) -> str:
    conditions = report["conditions"]
    return (
        f"{report['checkpoint']}, {conditions['engine']}, at most {conditions['max_num_tiles']} tiles, images enlarged "
        f"{conditions['upscale']} times before tiling; scores in per cent"
    )


def processes() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as `accelerate launch` and `torchrun` say them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def leave_the_others() -> None:
    """End what connects this process with the others: one that exits before them may be aborted otherwise."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def attempt(model: Any, out: Path, arguments: argparse.Namespace, task: str, style: str) -> dict[str, Any]:
    """Return the numbers of a benchmark, or why it has none: then the others go on.

    One of several processes raises its error, which ends all of them: the others would wait for it forever.
    """
    run: dict[str, Any] = {"task": task, "style": style}
    rank, num_processes = processes()
    try:
        file = AnswerFile(out, rank)
        with progress(desc=f"{BENCHMARKS[task].title}, {style}", unit="sample", disable=rank > 0 or None) as bar:
            model.keep_answers(file, style, bar)
            results = evaluate(model, task, style, arguments)
        if results is None:  # a process other than the first has no results
            return run
        rows = [
            row for row in AnswerFile(out).rows.values() if row["task"] == f"nemotron_{task}" and row["style"] == style
        ]
        run |= summarize(task, results, rows, getattr(model, "tokenizer", None))
        if run["failed"] == run["samples"]:
            raise ValueError(f"All {run['samples']} samples failed: {rows[0]['error']}")
    except (Exception, SystemExit) as error:  # lmms-eval raises what it likes, and exits where a file is missing
        if num_processes > 1:
            raise
        run["error_text"] = f"{type(error).__name__}: {sentence_of(error.__cause__ or error)}"[:500]
    return run


def compare(first: Path, second: Path) -> int:
    """Print the paired differences of two runs, `second` minus `first`, over the samples that both have."""
    reports = [read_report(folder) for folder in (first, second)]
    runs = [{(run["task"], run["style"]): run for run in report["runs"] if "scores" in run} for report in reports]
    lines, differences = [], {}
    for task, style in runs[0].keys() & runs[1].keys():
        old, new = (run[task, style]["scores"] for run in runs)
        shared = sorted(old.keys() & new.keys(), key=int)
        numbers = paired_difference([old[key] for key in shared], [new[key] for key in shared])
        differences[f"{task} {style}"] = numbers | {"samples": len(shared)}
        title = BENCHMARKS[task].title
        lines.append(
            [title, style, f"{len(shared):,}", f"{numbers['before']:.1f}", f"{numbers['after']:.1f}"]
            + [f"{numbers['difference']:+.2f}", f"{2 * numbers['standard_error']:.2f}"]
            + [str(numbers["became_wrong"]), str(numbers["became_right"])]
        )
    if not lines:
        raise ValueError(f"{first} and {second} have no benchmark in common.")
    names = [report["checkpoint"] for report in reports]
    headings = ("benchmark", "prompts", "samples", *names, "difference", "± 2 SE", "worse", "better")
    print(f"Means over the samples that both have, in per cent\n{table(headings, sorted(lines))}")
    print(json.dumps({"compare": names, "differences": differences}))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="the folder of the checkpoint, or nano")
    parser.add_argument("--tasks", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS))
    parser.add_argument("--styles", nargs="+", default=["nvidia"], choices=STYLES, help="of the prompts (nvidia)")
    parser.add_argument("--limit", type=positive, help="the first so many samples of each benchmark")
    parser.add_argument("--data", type=Path, help="a folder that holds the data sets under their Hub names")
    parser.add_argument("--out", type=Path, help="where answers and scores go (scores/NAME of the checkpoint)")
    parser.add_argument("--answers", type=Path, help="count the answers of this folder again, without a model")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two folders of scores")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument(
        "--model-args", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of vLLM's LLM class"
    )
    parser.add_argument("--device", help="for transformers (cuda if there is one)")
    parser.add_argument("--batch-size", type=positive, help="(8; on a CPU 1)")
    parser.add_argument("--max-num-tiles", type=positive, help="of a sample (the checkpoint's)")
    parser.add_argument("--upscale", type=int, choices=(1, 2), help="enlarge images before tiling (the checkpoint's)")
    parser.add_argument("--num-frames", type=positive, help="of a film (the checkpoint's: 16 for the 8B)")
    parser.add_argument("--max-new-tokens", type=positive, help="of an answer (each benchmark's own)")
    arguments = parser.parse_args(argv)
    if sum(value is not None for value in (arguments.checkpoint, arguments.answers, arguments.compare)) != 1:
        parser.error("give a checkpoint, or --answers FOLDER, or --compare A B")
    if arguments.model_args and (arguments.engine != "vllm" or not all("=" in item for item in arguments.model_args)):
        parser.error("--model-args takes NAME=VALUE, for --engine vllm")
    if arguments.engine == "vllm" and arguments.upscale == 2:
        parser.error("vLLM does not enlarge images before tiling: leave --upscale out, or take --engine transformers")
    return arguments


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.compare:
        return compare(*arguments.compare)
    if arguments.checkpoint:
        require_checkpoint(arguments.checkpoint)
    try:
        import lmms_eval.evaluator  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"No module named {error.name!r}; {INSTALL}.") from error
    if "ocrbench_v2" in arguments.tasks:
        require_wordnet()
    return score(arguments)


def require_wordnet() -> None:
    """Raise LookupError unless NLTK finds WordNet, which METEOR needs: after 10,000 answers it would be late."""
    import nltk

    try:
        nltk.data.find("corpora/wordnet")
    except LookupError:
        try:
            nltk.data.find("corpora/wordnet.zip")
        except LookupError:
            raise ValueError(
                "OCRBench v2 counts pages by METEOR, which needs WordNet. Install it: python -m nltk.downloader wordnet"
            ) from None


if __name__ == "__main__":
    prepare()
    sys.exit(main())
