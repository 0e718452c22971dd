"""`python -m tests.standard_suites` starts on a checkout of transformers, whose tests are a package of our name."""

import subprocess
import sys
from pathlib import Path

from tools import ROOT

# The shape of a git checkout of transformers 5: its suites import each other as `tests`, and by dots.
CHECKOUT = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/export_utils.py": "WORD = 'reached'",
    "exporters/test_export.py": """
import tests.exporters
from tests.exporters.export_utils import WORD
class ExportTesterMixin:
    def test_export(self):
        assert tests.exporters.export_utils.WORD == WORD == "reached"
""",
    "generation/__init__.py": "",
    "generation/test_utils.py": """
class GenerationTesterMixin:
    def test_generation(self):
        assert self.model_tester.get_config().model_type
""",
    "test_modeling_common.py": """
from .exporters.test_export import ExportTesterMixin
class ModelTesterMixin(ExportTesterMixin):
    def test_model(self):
        assert self.all_model_classes
""",
    "test_image_processing_common.py": """
class ImageProcessingTester: pass
class ImageProcessingTestMixin: pass
""",
    "test_processing_common.py": "class ProcessorTesterMixin: pass",
}


def test_suites_that_import_their_own_tests_package_run(tmp_path: Path):
    for name, content in CHECKOUT.items():
        file = tmp_path / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    command = [sys.executable, "-m", "tests.standard_suites", str(tmp_path), "-vv", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for test in ("test_export", "test_generation", "test_model"):
        assert f"ModelSuite::{test} PASSED" in done.stdout
