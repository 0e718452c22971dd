"""Ray Data: ask one question about many images, with one model in every worker.

    pip install "ray[data]"
    python examples/clients/ray_data.py path/to/flat "What is the total?" pages/*.png --out answers

Each worker loads the model itself. A model that the driver loads and sends cannot be read there, because its code was
loaded by transformers. On several machines, `path/to/flat` and the images must lie on a disk that all of them share.
"""

import argparse
import os
from pathlib import Path
from typing import Any


class Reader:
    """A worker: holds the model, and answers for a batch of images.

    Args:
        model_path: directory or Hub id of a checkpoint with our code beside it.
        question: asked about each image.
        num_threads: CPU threads of this worker; None leaves torch's own number.
        options: of `generate`.
    """

    def __init__(self, model_path: str, question: str, num_threads: int | None = None, **options: Any):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(model_path, dtype="auto", trust_remote_code=True)
        self.model = self.model.eval().to(device)
        self.question = question
        self.options = {"max_new_tokens": 256, "do_sample": False, **options}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the column `answer` to a batch with the column `path`."""
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": self.question}],
                }
            ]
            for path in batch["path"]
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            padding=True,
        ).to(self.model.device)
        output = self.model.generate(**inputs, **self.options)
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {**batch, "answer": [answer.strip() for answer in answers]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint with our code beside it")
    parser.add_argument("question")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="folder for the answers, as JSON lines")
    parser.add_argument("--workers", type=int, default=1, help="copies of the model; default 1")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker; default 0")
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args(argv)
    try:
        import ray
    except ImportError:
        parser.error("Ray Data is absent: pip install 'ray[data]'")
    num_threads = max(1, (os.cpu_count() or 1) // options.workers)
    arguments = {"model_path": str(options.model.resolve()), "question": options.question, "num_threads": num_threads}
    answers = ray.data.from_items([{"path": str(path.resolve())} for path in options.images]).map_batches(
        Reader,
        fn_constructor_kwargs=arguments,
        batch_size=options.batch_size,
        concurrency=options.workers,
        num_gpus=options.gpus,
    )
    answers.write_json(str(options.out.resolve()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
