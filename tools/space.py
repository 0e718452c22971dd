"""Write the page of `tools.app` as a Hugging Face Space: `python -m tools.app --space DIR`."""

import shutil
from importlib import metadata
from pathlib import Path

from . import ROOT

PACKAGE = "nemotron_vl"  # folder of the Space, and the name by which its modules import each other
# The versions that are installed here are those that the Space gets, so that what runs here runs there.
NEEDED = ("torch", "transformers", "accelerate", "safetensors", "gradio", "pypdfium2", "llguidance", "jsonschema")
FOLDERS = ("tools", "reading", "examples")
EXAMPLES = ("*.png", "*.pdf")

README = """---
title: Ask a document
emoji: 📄
colorFrom: gray
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
pinned: false
license: {licence}
short_description: Questions about images and PDFs, and their fields
---

Ask questions about an image or a PDF, see how it is cut into tiles, and read fields with their confidence. The model is
`{name}`. `{package}` holds the code, which is under Apache-2.0, and the model.

Run it anywhere:

```bash
pip install -r requirements.txt
python app.py
```
"""

APP = '''"""Ask a document: starts the page for the model in this folder."""

from pathlib import Path

from {package}.tools.app import main

main([str(Path(__file__).parent / "{package}" / {name!r})])
'''

# The Hub takes binary files only that way.
ATTRIBUTES = "".join(f"{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("*.safetensors", *EXAMPLES))


def write_space(directory: Path, checkpoint: Path) -> None:
    """Write a Space that shows a checkpoint: its code, its weights, the packages it needs, and what the Hub reads.

    Args:
        directory: of the Space; new, or empty but for what git keeps there.
        checkpoint: directory of a checkpoint, whose files are copied.

    Raises:
        ValueError: if the directory has files, or lies inside the checkpoint.
        ImportError: if a package is missing that the Space needs, with the command that installs it.
    """
    checkpoint = checkpoint.resolve()
    found = (
        [path.name for path in directory.iterdir() if path.name not in (".git", ".gitattributes")]
        if directory.exists()
        else []
    )
    if found:
        raise ValueError(f"{directory} already has files ({', '.join(sorted(found)[:3])}). Name a new directory.")
    if directory.resolve().is_relative_to(checkpoint):
        raise ValueError(f"{directory} lies inside the checkpoint, which is to be copied. Name another directory.")
    requirements = "".join(f"{name}=={version}\n" for name, version in installed_versions().items())
    code = directory / PACKAGE
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    name = checkpoint.name if checkpoint.name not in FOLDERS else f"{checkpoint.name}-checkpoint"
    shutil.copytree(checkpoint, code / name, ignore=ignored)
    # transformers 4.57 looks for a processor's class above the checkpoint, in the published configs, as in a clone.
    for pattern in ("*.py", "*.json", "*.jinja", "LICENSE"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, code)
    for folder in FOLDERS[:2]:
        shutil.copytree(ROOT / folder, code / folder, ignore=ignored)
    (code / "examples").mkdir()
    for pattern in EXAMPLES:
        for file in (ROOT / "examples").glob(pattern):
            shutil.copy(file, code / "examples")
    licence = "apache-2.0" if checkpoint == ROOT / "nano" else "other"
    values = {"gradio": metadata.version("gradio"), "licence": licence, "name": name, "package": PACKAGE}
    (directory / "README.md").write_text(README.format(**values), encoding="utf-8")
    (directory / "requirements.txt").write_text(requirements, encoding="utf-8")
    (directory / "app.py").write_text(APP.format(**values), encoding="utf-8")
    (directory / ".gitattributes").write_text(ATTRIBUTES, encoding="utf-8")


def installed_versions() -> dict[str, str]:
    """Return the version of each package that the Space needs, without what says how it was built ("+cpu").

    Raises:
        ImportError: if one is not installed.
    """
    versions = {}
    for name in NEEDED:
        try:
            versions[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError as error:
            raise ImportError(
                f"A Space gets the versions that are installed here, and {name} is not: pip install {name}"
            ) from error
    return versions
