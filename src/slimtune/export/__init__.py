"""From a run to what another program loads: merged model, GGUF, Ollama, vLLM, the Hub; and the proof that it is right.

Imports the core, evaluation and generation. One format, one file. Start at `exporter.py`, then `verify.py`.
"""
