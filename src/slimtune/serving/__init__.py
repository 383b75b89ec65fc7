"""An OpenAI-compatible server over one base and the adapters of several runs.

models                 the models by name: the base, and one for each run
runner                 prompts and batches through the model, with a cache of keys and values
answers                answers that are asked for, their pieces of text, and the queue in which they wait
continuous_batching    the thread that owns the model: requests join and leave its batches at every token
llama_cpp              the same answers from llama.cpp (--engine llama.cpp)
tool_calls             how a chat template writes calls, and calls in an answer
protocol               requests, answers and errors as OpenAI's API has them
app                    the HTTP endpoints
server                 the process: port, signals, shutdown
"""
