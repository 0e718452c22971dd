"""Run transformers' model linter over the shipped modules; every exception has its reason here.

    python -m tools.lint

mlinter chooses its rules by file name, so modules with other names are linted under a link of a name it knows.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from . import ROOT
from .command_line import command_parser

LINTED_AS = {
    "configuration_nemotron_vl.py": "configuration_nemotron_vl.py",
    "modeling_nemotron_vl.py": "modeling_nemotron_vl.py",
    "processing_nemotron_vl.py": "processing_nemotron_vl.py",
    "image_processing.py": "image_processing_nemotron_vl.py",
    "video_processing.py": "image_processing_video.py",
    "radio_model.py": "modeling_radio.py",
    "checkpoint.py": "modeling_checkpoint.py",
    "quantization_nemotron_vl.py": "modeling_quantization.py",
    "prompts.py": "processing_prompts.py",
    "chat.py": "modeling_chat.py",
}

EXCEPTIONS = {
    "TRF010": "@strict does not exist on transformers 4.57; the configs check themselves and say what is wrong",
    "TRF022": "the Llama blocks are named so that accelerate places whole blocks on 4.57 as well",
    "TRF028": "the licence is Apache-2.0 for the whole repository; NVIDIA's header would claim their authorship",
    "TRF036": "mlp1 is an nn.Sequential because the published keys are mlp1.0, mlp1.1 and mlp1.3",
    "TRF057": "@auto_docstring does not describe remote code on transformers 4.57; the docstrings are written out",
}


def lint() -> list[str]:
    """Return what mlinter finds beyond the exceptions, a line each.

    Raises:
        ImportError: if mlinter is not installed.
    """
    mlinter = Path(sys.executable).with_name("mlinter")
    if not mlinter.exists():
        raise ImportError(f"{mlinter} is not installed: pip install transformers-mlinter")
    with tempfile.TemporaryDirectory() as folder:
        for name, linted_name in LINTED_AS.items():
            (Path(folder) / linted_name).symlink_to(ROOT / name)
        report = Path(folder) / "report.json"
        subprocess.run(
            [mlinter, "--no-progress", "--no-cache", "--output-json", report, folder], capture_output=True, check=False
        )
        findings = json.loads(report.read_text(encoding="utf-8"))["findings"]
    names = {linted_name: name for name, linted_name in LINTED_AS.items()}
    return [
        f"{names[Path(finding['path']).name]}:{finding['line']}: {finding['message']}"
        for finding in findings
        if finding["rule"] not in EXCEPTIONS
    ]


def main(argv: list[str] | None = None) -> int:
    command_parser("lint", __doc__).parse_args(argv)
    findings = lint()
    print("\n".join(findings) or "mlinter: nothing beyond the exceptions in tools/lint.py.")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
