"""A server for OpenAI clients around one model; `python -m tools.serve` starts it, docs/serving.md describes it."""
