"""Measurements, run from the repository root as `python -m benchmarks.NAME`; each prints one JSON line."""

import tools  # noqa: F401  (registers the root as the package `nemotron_vl`)
