"""Servers that answer in the dialects of vLLM, SGLang, LM Studio, Ollama, mlx-lm and of chats alone, with the words of
a given model.

    front      ids that the server puts in front of every prompt
    cut        tokens at the end of a prompt that it keeps
    counts     it says how many tokens it counted in a prompt
    zeros      its log-probabilities are those of the greedy choice
    shown      it gives no log-probabilities below that one
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Dialect(BaseHTTPRequestHandler):
    """Answers by `self.server`: models (name → model), parents, tokenizer, dialect, status, delay."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.refuse():
            return
        if self.path == "/v1/models" and self.server.dialect != "ollama-old":
            parents = self.server.parents
            self.answer({"data": [{"id": name, "parent": parents.get(name)} for name in self.server.models]})
        elif self.path == "/api/version" and self.server.dialect == "ollama":
            self.answer({"version": "0.34.1"})
        else:
            self.fail(404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refuse():
            return
        model = self.server.models.get(body.get("model"))
        if self.server.lies:
            model = next(iter(self.server.models.values()))
        if model is None:
            self.fail(404)
        elif self.path == "/v1/completions" and self.server.dialect != "chat":
            self.complete(model, body)
        elif self.path == "/v1/chat/completions" and self.server.dialect == "chat":
            self.chat(model, body)
        elif self.path == "/api/generate" and self.server.dialect == "ollama":
            self.answer_as_ollama(model, body)
        elif self.path == "/tokenize" and self.server.dialect == "vllm":
            text, bos = body.get("prompt"), self.server.bos
            if text is None:
                text = self.server.template.format(body["messages"][0]["content"])
            ids = self.server.tokenizer(text, add_special_tokens=False)["input_ids"]
            self.answer({"tokens": [*bos, *ids]})
        else:
            self.fail(404)

    def encode(self, prompt):
        """The ids of a prompt, as the server changes it."""
        ids = (
            self.server.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        )
        return [*self.server.front, *ids][-self.server.cut :]

    def complete(self, model, body):
        dialect, prompt = self.server.dialect, body["prompt"]
        is_text, is_mlx = isinstance(prompt, str), dialect == "mlx"
        if (dialect in ("answers", "greedy", "mlx") and not is_text) or (body.get("echo") and dialect != "echo"):
            self.fail(400)
            return
        if is_mlx and not isinstance(body.get("logprobs", False), bool):
            self.fail(400)
            return
        ids = self.encode(prompt)
        new, values = self.generate(model, ids, body["max_tokens"])
        tokens = [self.server.tokenizer.decode([i]) for i in new]
        choice = {"text": "".join(tokens), "finish_reason": "length", "token_ids": new, "logprobs": None}
        own = self.score(model, ids)
        if dialect == "vllm" and body.get("prompt_logprobs"):
            pairs = zip(ids[1:], own, strict=True)
            other = {"3": {"logprob": -1.0, "rank": 1}}
            found = ({str(i): {"logprob": v, "rank": 1}} if v > self.server.shown else other for i, v in pairs)
            choice["prompt_logprobs"] = [None, *found]
        if dialect == "echo" and body.get("echo"):
            choice["logprobs"] = {"token_logprobs": [None, *own, *values], "tokens": []}
        if dialect == "answers" and body.get("logprobs"):
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values}
        if is_mlx and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"id": i, "logprob": v} for i, v in zip(new, values, strict=True)]}
        self.answer({"choices": [choice], **self.count(ids)})

    def chat(self, model, body):
        ids = self.encode(self.server.template.format(body["messages"][0]["content"]))
        new, values = self.generate(model, ids, body["max_tokens"])
        tokens = [self.server.tokenizer.decode([i]) for i in new]
        entries = [{"token": t, "logprob": v} for t, v in zip(tokens, values, strict=True)]
        message = {"role": "assistant", "content": "".join(tokens)}
        self.answer({"choices": [{"message": message, "logprobs": {"content": entries}}], **self.count(ids)})

    def count(self, ids):
        return {"usage": {"prompt_tokens": len(ids)}} if self.server.counts else {}

    def answer_as_ollama(self, model, body):
        ids = self.encode(self.server.tokenizer.bos_token + body["prompt"])
        new, values = self.generate(model, ids, body["options"]["num_predict"])
        tokens = [self.server.tokenizer.decode([i]) for i in new]
        entries = [{"token": t, "logprob": v} for t, v in zip(tokens, values, strict=True)]
        counted = {"prompt_eval_count": len(ids)} if self.server.counts else {}
        self.answer({"response": "".join(tokens), "logprobs": entries, **counted})

    @torch.no_grad()
    def score(self, model, ids):
        log_probs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        values = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        noise = torch.Generator().manual_seed(len(ids))
        return (values + self.server.noise * torch.randn(len(values), generator=noise).double()).tolist()

    @torch.no_grad()
    def generate(self, model, ids, count):
        new, values = [], []
        for _ in range(count):
            log_probs = model(torch.tensor([[*ids, *new]])).logits[0, -1].double().log_softmax(-1)
            new.append(int(log_probs.argmax()))
            values.append(0.0 if self.server.zeros else float(log_probs.max()))
        return new, values

    def refuse(self):
        time.sleep(self.server.delay)
        key = self.headers.get("Authorization")
        if self.server.key and key != f"Bearer {self.server.key}":
            self.fail(401)
        elif self.server.status:
            self.fail(self.server.status)
        return bool(self.server.status or (self.server.key and key != f"Bearer {self.server.key}"))

    def fail(self, status):
        self.answer({"error": {"message": "no"}}, status)

    def answer(self, values, status=200):
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(models, tokenizer, dialect, **settings):
    """Serve models by name; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dialect)
    given = {
        "parents": {}, "bos": [], "template": "", "status": 0, "delay": 0, "key": None, "noise": 0.0, "lies": False,
        "front": [], "cut": 0, "counts": False, "zeros": False, "shown": -1e9,
    }  # fmt: skip
    for name, value in {**given, **settings, "models": models, "tokenizer": tokenizer, "dialect": dialect}.items():
        setattr(server, name, value)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
