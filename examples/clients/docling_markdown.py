"""docling: turn the pages of documents into Markdown with this model.

    pip install docling
    python examples/clients/docling_markdown.py path/to/flat document.pdf > document.md

Without `skip_special_tokens`, docling keeps the token that ends an answer, `<|eot_id|>`, in the Markdown.
"""

import argparse
from pathlib import Path
from typing import Any

DECODING = {"skip_special_tokens": True}
PROMPT = "Transcribe the page."


def model_options(folder: Path, **changes: Any) -> dict[str, Any]:
    """What docling's `InlineVlmOptions` takes for a checkpoint with our code beside it.

    docling looks for the folder among its artifacts; `pipeline_options` says where those are.
    """
    return {
        "repo_id": folder.resolve().name,
        "prompt": PROMPT,
        "response_format": "markdown",
        "inference_framework": "transformers",
        "transformers_model_type": "automodel-imagetexttotext",
        "trust_remote_code": True,
        "scale": 2.0,  # a PDF at 144 dpi, an image at twice its size
        "temperature": 0.0,
        "extra_generation_config": DECODING,
        **changes,
    }


def converter(folder: Path, **changes: Any) -> Any:
    """A docling `DocumentConverter` for PDF files and images; `changes` go to `model_options`."""
    from docling.datamodel.base_models import InputFormat
    from docling.datamodel.pipeline_options import VlmPipelineOptions
    from docling.datamodel.pipeline_options_vlm_model import InlineVlmOptions
    from docling.document_converter import DocumentConverter, ImageFormatOption, PdfFormatOption
    from docling.pipeline.vlm_pipeline import VlmPipeline

    pipeline_options = VlmPipelineOptions(
        artifacts_path=folder.resolve().parent,
        vlm_options=InlineVlmOptions(**model_options(folder, **changes)),
    )
    formats = {InputFormat.PDF: PdfFormatOption, InputFormat.IMAGE: ImageFormatOption}
    return DocumentConverter(
        allowed_formats=list(formats),
        format_options={
            name: option(pipeline_cls=VlmPipeline, pipeline_options=pipeline_options)
            for name, option in formats.items()
        },
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint with our code beside it")
    parser.add_argument("document", type=Path, nargs="+", help="PDF or image")
    parser.add_argument(
        "--prompt", default=PROMPT, help="what the model is asked about each page; default: %(default)s"
    )
    parser.add_argument(
        "--scale", type=float, default=2.0, help="size of a page, 1 is 72 dpi; default 2, for nano take 1"
    )
    options = parser.parse_args(argv)
    try:
        convert = converter(options.model, prompt=options.prompt, scale=options.scale)
    except ImportError as error:
        parser.error(f"docling is absent ({error}): pip install docling")
    for result in convert.convert_all(options.document):
        print(result.document.export_to_markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
