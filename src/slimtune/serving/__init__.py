"""An OpenAI-compatible server over one base and the adapters of several runs.

model_server        the process: port, signals, shutdown
openai_api          the HTTP endpoints
openai_protocol     requests, answers and errors as OpenAI's API has them
served_models       the models by name: the base, and one for each run
tool_calls          how a chat template writes calls, and calls in an answer
llama_cpp_server    the same answers from llama.cpp (--engine llama.cpp)

Imports the core, generation and export. Start at `model_server.py`; what generates the answers is in `generation/`.
"""
