"""One text generator: prompts and batches through a model or an engine, with an adapter for each row.

generation_models        the base or an adapter with its tokenizer and end tokens; conversations become prompts
answer_grammar           JSON Schemas and regular expressions that bind answers
grammar_check            a process that compiles such a grammar first
answer_queue             answers that are asked for, and what arrives of them; sampling settings and log-probabilities
text_generator           the generator: answers join and leave its batches at every token
model_runner             prompts and batches through the model, with a cache of keys and values
incremental_detokenizer  the text of an answer that grows by a token at a time
conversation             a conversation with one model
training_samples         answers of a model that trains, between two of its steps
chat_worker              the process that holds the model of a chat
run_requirements         where a run's base is, and whether it writes text, before anything is loaded
inference_engines        transformers, llama.cpp and vLLM, which say how likely a text is
json_client              requests with JSON to a server that the user named

Imports the core, and the activated LoRA's offsets from extras. Start at `text_generator.py`.
"""
