"""Run NVIDIA's published code and ours side by side on your images; print the largest difference of every stage.

    python -m tools.compare DOWNLOAD page.png receipt.png --published-python OLD/bin/python --tower C-RADIOv2-H

DOWNLOAD is NVIDIA's repository as downloaded, BF16 weights and its own Python files; the tower's code lies in a second
repository. Both run as they are, in a process of their own under OLD/bin/python: they need an old transformers.

    python -m venv OLD
    OLD/bin/pip install torch torchvision transformers==4.53.3 accelerate pillow timm==1.0.19 einops==0.8.1 open-clip-torch==3.1.0
    hf download nvidia/C-RADIOv2-H --include "*.py" "*.json" --local-dir C-RADIOv2-H

What is missing is listed before anything runs, and nothing is downloaded. Stages: tiles, tower, projector, logits
(last prompt position and every new token, as long as both chose the same ones), text. Without a GPU the published
code's `.cuda()` calls are lifted, and in float32 its hard-coded bfloat16. `--keep FOLDER` stores what the published
code computed; `--published FOLDER` compares with that later, on a machine that needs none of the above.

The last line of the output is one JSON object; the status is 0 if every stage agrees, 1 if one differs, 2 if the
published code cannot run. Agreeing means: tiles exactly, other stages within 1e-4 times their largest magnitude (if
above 1), text exactly. That is for float32; bfloat16 only shows the differences.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import ROOT
from .command_line import command_parser, usable_device

PUBLISHED_PACKAGES = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "einops": "einops==0.8.1",
    "numpy": "numpy",
    "open_clip": "open-clip-torch==3.1.0",
    "safetensors": "safetensors",
    "timm": "timm==1.0.19",
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers==4.53.3",
}
LAST_TRANSFORMERS = 4  # on 5 the published classes lack post_init(), and the doubling of images is skipped
STAGES = ("tiles", "tower", "projector", "logits")
TOLERANCE = 1e-4
DEFAULT_QUESTION = "Extract all the text in this image."


# --- what the published code needs ---


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def tower_repository(download: Path) -> tuple[str, str]:
    """Where the published config takes the tower's code from, repository and file: `("nvidia/...", "hf_model.py")`."""
    reference = read_json(download / "config.json")["vision_config"]["auto_map"]["AutoConfig"]
    repository, _, name = reference.rpartition("--")
    return repository, f"{name.split('.')[0]}.py"


def missing_files(download: Path, tower: Path | None) -> list[str]:
    """Say what the two downloads lack, one sentence each."""
    if not (download / "config.json").is_file():
        return [f"{download} holds no config.json: name the folder of NVIDIA's download."]
    config = read_json(download / "config.json")
    references = [config.get("auto_map", {}).get(name) for name in ("AutoConfig", "AutoModel")]
    processor_file = download / "preprocessor_config.json"
    if processor_file.is_file():
        references.append(read_json(processor_file).get("auto_map", {}).get("AutoImageProcessor"))
    names = ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
    names += [f"{reference.split('.')[0]}.py" for reference in references if reference]
    if (download / "model.safetensors.index.json").is_file():
        names += sorted(set(read_json(download / "model.safetensors.index.json")["weight_map"].values()))
    elif not list(download.glob("*.safetensors")):
        names.append("model.safetensors")
    problems = [f"{download / name} is not there." for name in names if not (download / name).is_file()]
    if "modeling_nemotron_vl.py" in names:
        problems.append(f"{download} holds our code, not the published one: name the download that was adopted.")
    repository, file = tower_repository(download) if "vision_config" in config else ("", "")
    if repository and (tower is None or not (tower / file).is_file()):
        problems.append(
            f"The tower's code ({file}) is not {'given' if tower is None else f'in {tower}'}: hf download {repository} "
            f'--include "*.py" "*.json" --local-dir DIR, and pass --tower DIR.'
        )
    return problems


def imported_packages(folder: Path) -> set[str]:
    """Packages that the Python files of a folder import unconditionally: at the top level, outside of try and if."""
    packages = set()
    for file in folder.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                packages.add(node.module.split(".")[0])
    return packages - set(sys.stdlib_module_names)


def missing_packages(python: str, packages: set[str]) -> tuple[list[str], str]:
    """Ask an interpreter which packages it lacks; also return its version of transformers, "" without one."""
    script = (
        "import importlib.util, importlib.metadata, json, sys\n"
        "found = {name: importlib.util.find_spec(name) is not None for name in sys.argv[1:]}\n"
        "version = importlib.metadata.version('transformers') if found['transformers'] else ''\n"
        "print(json.dumps([[name for name in found if not found[name]], version]))"
    )
    needed = sorted(packages | {"torch", "transformers", "accelerate", "safetensors", "PIL"})
    output = subprocess.run([python, "-c", script, *needed], capture_output=True, text=True, check=True).stdout
    missing, version = json.loads(output.splitlines()[-1])
    return missing, version


def what_is_missing(download: Path, tower: Path | None, python: str) -> list[str]:
    """Return what keeps the published code from running, as sentences with the remedy."""
    problems = missing_files(download, tower)
    packages: set[str] = set()
    for folder in (download, tower):
        packages |= imported_packages(folder) if folder is not None and folder.is_dir() else set()
    try:
        missing, version = missing_packages(python, packages)
    except (OSError, subprocess.CalledProcessError) as error:
        return [*problems, f"{python} does not run ({error}): name an interpreter with --published-python."]
    if missing:
        named = " ".join(PUBLISHED_PACKAGES.get(name, name) for name in missing)
        problems.append(f"{python} lacks {', '.join(missing)}: {python} -m pip install {named}")
    if version and int(version.split(".")[0]) > LAST_TRANSFORMERS:
        print(f"NOTE: {python} has transformers {version}; the published code is known to run on 4.53.3, not on 5.")
    return problems


# --- one side: every case through one model ---


def load_published(download: Path, dtype: Any) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of the published code, made to run without a GPU and in `dtype`."""
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    trusted = {"trust_remote_code": True, "attn_implementation": "eager"}  # the file asks for flash-attn
    config = AutoConfig.from_pretrained(download, **trusted)
    model = AutoModel.from_pretrained(download, config=config, torch_dtype=dtype, **trusted).eval().to(dtype)
    for module in model.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):  # the tower's conditioner casts to it
            module.dtype = dtype
    tokenizer = AutoTokenizer.from_pretrained(download)
    image_processor = AutoImageProcessor.from_pretrained(download, trust_remote_code=True)
    torch.bfloat16 = dtype  # after loading, so that only the casts inside the published code read it
    return model, tokenizer, image_processor


def load_ours(download: Path, dtype: Any) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of this repository, on the same files."""
    from nemotron_vl.image_processing import NemotronVLImageProcessor
    from nemotron_vl.modeling_nemotron_vl import Llama_Nemotron_Nano_VL
    from transformers import AutoTokenizer

    model = Llama_Nemotron_Nano_VL.from_pretrained(download, torch_dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(download), NemotronVLImageProcessor.from_pretrained(download)


def record(model: Any, tokenizer: Any, image_processor: Any, case: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Answer one case by `chat()`; return the outputs of the stages and the answer.

    Both codes name their modules as the checkpoint does.
    """
    import torch
    from PIL import Image

    caught: dict[str, list[Any]] = {"tower": [], "projector": [], "logits": []}
    hooks = {
        "vision_model": lambda _, __, output: caught["tower"].append(getattr(output, "features", None)),
        "mlp1": lambda _, __, output: caught["projector"].append(output),
        "language_model.lm_head": lambda _, __, output: caught["logits"].append(output[:, -1]),
    }
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    images = [Image.open(file).convert("RGB") for file in case["images"]]
    features = dict(image_processor(images)) if images else {"pixel_values": None}
    options = {"max_new_tokens": case["max_new_tokens"], "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    history = [tuple(turn) for turn in case["history"]] if case.get("history") else None
    asked = {"question": case["question"], "generation_config": options, "history": history}
    try:
        with torch.no_grad():
            answer = model.chat(tokenizer=tokenizer, **features, **asked, system_prompt=case.get("system_prompt"))
    finally:
        for handle in handles:
            handle.remove()
    if images:
        caught["tiles"] = [torch.as_tensor(features["pixel_values"])]
    stages = {name: torch.cat(list(parts)).float().cpu().contiguous() for name, parts in caught.items() if parts}
    return stages, answer


def run_side(side: str, download: Path, cases: list[dict[str, Any]], dtype_name: str, device: str, out: Path) -> None:
    """Run all cases on one side and write `run.json` and `stages.safetensors`."""
    import torch
    import transformers
    from safetensors.torch import save_file

    load = load_published if side == "published" else load_ours
    model, tokenizer, image_processor = load(download, getattr(torch, dtype_name))
    model.to(device)
    tensors, answers = {}, []
    for index, case in enumerate(cases):
        stages, answer = record(model, tokenizer, image_processor, case)
        tensors |= {f"{index}.{stage}": tensor for stage, tensor in stages.items()}
        answers.append(case | {"answer": answer})
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "stages.safetensors")
    conditions = {"torch": torch.__version__, "transformers": transformers.__version__}
    conditions |= {"dtype": dtype_name, "device": device}
    (out / "run.json").write_text(json.dumps({"cases": answers, "conditions": conditions}, indent=1), encoding="utf-8")


def start_side(side: str, python: str, arguments: argparse.Namespace, cases: Path, out: Path, work: Path) -> None:
    """Run one side in a process of its own, offline, with the tower's code in the cache where transformers looks.

    Raises:
        RuntimeError: with the end of its messages, if it fails.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / f"modules-{side}")}
    if side == "published":
        environment["HF_HUB_CACHE"] = str(work / "hub")
        repository, _ = tower_repository(arguments.download)
        if repository:
            place_in_cache(work / "hub", repository, arguments.tower)
    command = [python, "-m", "tools.compare", arguments.download.resolve(), "--side", side, "--cases", cases]
    command += ["--keep", out, "--dtype", arguments.dtype, "--device", arguments.device]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"The {side} code failed:\n{finished.stderr[-3000:]}")


def place_in_cache(cache: Path, repository: str, folder: Path) -> None:
    """Make a folder the cached copy of a Hub repository: its relative imports are then resolved as on the Hub."""
    commit = "0" * 40
    entry = cache / f"models--{repository.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    (entry / "snapshots").mkdir()
    (entry / "snapshots" / commit).symlink_to(folder.resolve(), target_is_directory=True)


# --- both sides ---


def compare(published: Path, ours: Path) -> list[dict[str, Any]]:
    """Compare two dumps: a row for every case and stage, with what was compared, the largest difference, and whether
    that is agreement."""
    from safetensors.torch import load_file

    tensors = [load_file(folder / "stages.safetensors") for folder in (published, ours)]
    cases = [read_json(folder / "run.json")["cases"] for folder in (published, ours)]
    rows = []
    for index, (theirs, own) in enumerate(zip(*cases, strict=True)):
        for stage in STAGES:
            pair = [side.get(f"{index}.{stage}") for side in tensors]
            if pair[0] is not None or pair[1] is not None:
                rows.append({"case": name_of(theirs, index), "stage": stage, **compare_stage(stage, *pair)})
        same = theirs["answer"] == own["answer"]
        text = {"compared": f"{len(theirs['answer'])} characters", "difference": None, "largest": None, "agrees": same}
        rows.append({"case": name_of(theirs, index), "stage": "text", **text})
    return rows


def name_of(case: dict[str, Any], index: int) -> str:
    return case.get("name") or ", ".join(Path(file).name for file in case["images"]) or f"case {index}"


def compare_stage(stage: str, theirs: Any, own: Any) -> dict[str, Any]:
    """Largest difference of one stage. Dumps may hold the first tiles of the tower alone, or the first logits."""
    if theirs is None or own is None:
        return {"compared": "on one side only", "difference": None, "largest": None, "agrees": False}
    count = longest = max(len(theirs), len(own))
    if stage == "logits":
        count = common_steps(theirs, own)
    elif stage == "tower":
        count = min(len(theirs), len(own))
    partial = stage in ("tower", "logits")
    if theirs.shape[1:] != own.shape[1:] or (len(theirs) != len(own) and not partial):
        shapes = f"{list(theirs.shape)} against {list(own.shape)}"
        return {"compared": shapes, "difference": None, "largest": None, "agrees": False}
    difference = float((theirs[:count] - own[:count]).abs().max())
    largest = float(theirs[:count].abs().max())
    limit = 0.0 if stage == "tiles" else TOLERANCE * max(1.0, largest)
    unit = "steps" if stage == "logits" else "tiles"
    compared = f"{count} of {longest} {unit}" if count < longest else f"{count} {unit}"
    return {"compared": compared, "difference": difference, "largest": largest, "agrees": difference <= limit}


def common_steps(theirs: Any, own: Any) -> int:
    """Number of decode steps whose preceding tokens are the same on both sides."""
    count = min(len(theirs), len(own))
    differ = (theirs[:count].argmax(-1) != own[:count].argmax(-1)).nonzero()
    return int(differ[0]) + 1 if len(differ) else count


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| case | stage | compared | largest difference | largest magnitude | |", "|---|---|---|---|---|---|"]
    for row in rows:
        numbers = ["" if row[key] is None else f"{row[key]:.2e}" for key in ("difference", "largest")]
        verdict = "agrees" if row["agrees"] else "DIFFERS"
        lines.append(f"| {row['case']} | {row['stage']} | {row['compared']} | {' | '.join(numbers)} | {verdict} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("compare", __doc__)
    parser.add_argument("download", type=Path, metavar="DOWNLOAD", help="NVIDIA's repository as downloaded")
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE")
    parser.add_argument("--published-python", default=sys.executable, help="interpreter with the old transformers")
    parser.add_argument("--tower", type=Path, metavar="DIR", help="code of the tower's repository")
    parser.add_argument("--question", default=DEFAULT_QUESTION, help="asked about each image: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="store what the published code computed")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="compare with what --keep stored")
    parser.add_argument("--side", choices=("published", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_intermixed_args(argv)  # images may follow options
    if arguments.side:
        cases = read_json(arguments.cases)["cases"]
        run_side(arguments.side, arguments.download, cases, arguments.dtype, arguments.device, arguments.keep)
        return 0
    if bool(arguments.images) == bool(arguments.published):
        parser.error("give images, or --published FOLDER with those of an earlier run.")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        published = arguments.published or arguments.keep or work / "published"
        if arguments.published is None:
            problems = what_is_missing(arguments.download, arguments.tower, arguments.published_python)
            if problems:
                print("The published code cannot run yet:", *problems, sep="\n- ")
                return 2
            asked = {"question": arguments.question, "max_new_tokens": arguments.max_new_tokens}
            cases = [{"images": [str(image.resolve())], **asked} for image in arguments.images]
            (work / "cases.json").write_text(json.dumps({"cases": cases}), encoding="utf-8")
            published = published.resolve()
            start_side("published", arguments.published_python, arguments, work / "cases.json", published, work)
        start_side("ours", sys.executable, arguments, published.resolve() / "run.json", work / "ours", work)
        rows = compare(published, work / "ours")
        conditions = {
            side: read_json(place / "run.json")["conditions"]
            for side, place in (("published", published), ("ours", work / "ours"))
        }
    print(table(rows))
    print(json.dumps({"conditions": conditions, "rows": rows}))
    return int(not all(row["agrees"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
