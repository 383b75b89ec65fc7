"""Answers of rows that share batches: tokens and log-probabilities are those of the adapter alone."""

import threading

import pytest
import torch
from models_zoo import gemma2, gpt2, llama, qwen2, shake
from waiting import wait_until

from slimtune import BottleneckConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from slimtune.core.adapters.active_adapters import BASE_ROW
from slimtune.generation.answer_queue import GeneratedAnswer, QueueFull, SamplingParams
from slimtune.generation.generation_models import GenerationModel
from slimtune.generation.text_generator import TextGenerator

LORA, OTHER = {"r": 2, "lora_alpha": 16}, {"r": 3, "use_dora": True}
CONFIGS = {
    "LoRA": lambda: LoraConfig(task_type="CAUSAL_LM", **LORA),
    "DoRA": lambda: LoraConfig(task_type="CAUSAL_LM", **OTHER),
    "aLoRA": lambda: LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], **LORA),
    "IA3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "Bottleneck": lambda: BottleneckConfig(task_type="CAUSAL_LM"),
    "Prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "Prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
FAMILIES = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "gemma2": gemma2}


def adapt(base, names):
    """Return a base with an adapter of random weights for each of `CONFIGS`."""
    first, *others = names
    model = get_peft_model(base, CONFIGS[first](), adapter_name=first)
    for name in others:
        model.add_adapter(name, CONFIGS[name]())
    for number, name in enumerate(names):
        model.set_adapter(name)
        shake(model, seed=number)
    return model.eval()


def make_prompt(number, length):
    return torch.randint(7, 128, (length,), generator=torch.Generator().manual_seed(number)).tolist()


@torch.no_grad()
def generate_alone(model, adapter, prompt, count):
    """Return greedy tokens and their log-probabilities, without a cache and without other rows."""
    ids, values = list(prompt), []
    if adapter != BASE_ROW:
        model.set_adapter(adapter)
    for _ in range(count):
        inputs = {"input_ids": torch.tensor([ids]), "use_cache": False}
        if adapter == BASE_ROW:
            with model.disable_adapter():
                logits = model(**inputs).logits[0, -1]
        else:
            logits = model(**inputs).logits[0, -1]
        values.append(logits.log_softmax(-1).max().item())
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], values


class Job:
    """An answer, and what arrives of it."""

    def __init__(self, adapter, prompt, tokenizer, **params):
        self.pieces, self.done = [], threading.Event()
        model = GenerationModel(adapter, tokenizer, frozenset(), 512)
        self.answer = GeneratedAnswer(model, prompt, SamplingParams(**params), self.receive)

    def receive(self, piece):
        self.pieces.append(piece)
        if piece.finish_reason or piece.error:
            self.done.set()

    def result(self):
        assert self.done.wait(30)
        assert self.pieces[-1].error is None
        found = [entry for piece in self.pieces for entry in piece.logprobs]
        return [entry.token for entry in found], [entry.logprob for entry in found]


@pytest.fixture
def start():
    """Start the thread for a model: `start(model, max_batch=2)`."""
    started = []

    def make(model, **settings):
        started.append(TextGenerator(model, **{"max_batch": 4, "max_waiting": 99, **settings}))
        started[-1].start()
        return started[-1]

    yield make
    for generator in started:
        generator.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_their_adapter_alone(family, start, tiny_tokenizer):
    names = ["LoRA", "DoRA", "aLoRA", "IA3", "Bottleneck", "Prompt", "Prefix"]
    model = adapt(FAMILIES[family](dtype=torch.float32), names)
    plan = [(name, make_prompt(i, 3 + 2 * i), 4 + i % 3) for i, name in enumerate([*names, BASE_ROW, "LoRA"])]
    plan.append(("aLoRA", [*make_prompt(20, 3), 5, 6, 9], 6))
    expected = [generate_alone(model, *each) for each in plan]
    generator, tokenizer = start(model), tiny_tokenizer()
    jobs = [Job(name, prompt, tokenizer, max_new_tokens=n, top_logprobs=0) for name, prompt, n in plan]
    generator.submit([job.answer for job in jobs])
    for job, (tokens, values), (name, *_) in zip(jobs, expected, plan, strict=True):
        found = job.result()
        assert found[0] == tokens, name
        assert found[1] == pytest.approx(values, abs=2e-5), name
    assert {name: generator.runner.mixes(name) for name in names} == {
        **dict.fromkeys(names, True), "Prompt": False, "Prefix": False,
    }  # fmt: skip


def test_row_joins_a_running_batch(start, tiny_tokenizer):
    model = adapt(llama(dtype=torch.float32), ["LoRA", "DoRA"])
    first, second = ("LoRA", make_prompt(1, 4), 40), ("DoRA", make_prompt(2, 9), 5)
    expected = [generate_alone(model, *each)[0] for each in (first, second)]
    generator = start(model)
    jobs = [Job(n, prompt, tiny_tokenizer(), max_new_tokens=c, top_logprobs=0) for n, prompt, c in (first, second)]
    generator.submit([jobs[0].answer])
    wait_until(lambda: jobs[0].pieces)
    generator.submit([jobs[1].answer])
    results = [job.result()[0] for job in jobs]
    assert results == expected


def test_cancelled_row_frees_its_place(start, tiny_tokenizer):
    generator = start(adapt(llama(dtype=torch.float32), ["LoRA"]), max_batch=1)
    endless, other = (Job("LoRA", [7, 8], tiny_tokenizer(), max_new_tokens=n) for n in (10**6, 3))
    generator.submit([endless.answer])
    generator.submit([other.answer])
    assert not other.done.wait(0.2)
    generator.cancel([endless.answer])
    assert other.done.wait(30)
    assert not endless.done.is_set()
    wait_until(lambda: generator.count() == {"running": 0, "waiting": 0, "cached_tokens": 0})


def test_waiting_answers_are_bounded(start, tiny_tokenizer):
    generator = start(adapt(llama(dtype=torch.float32), ["LoRA"]), max_batch=1, max_waiting=2)
    jobs = [Job("LoRA", [7, 8], tiny_tokenizer(), max_new_tokens=10**6) for _ in range(4)]
    generator.submit([jobs[0].answer])
    wait_until(lambda: not generator.count()["waiting"])
    generator.submit([job.answer for job in jobs[1:3]])
    with pytest.raises(QueueFull, match=r"\b2 answers"):
        generator.submit([jobs[3].answer])


def test_late_answer_ends(start, tiny_tokenizer):
    generator = start(adapt(llama(dtype=torch.float32), ["LoRA"]), max_batch=1)
    running, waiting = (Job("LoRA", [7], tiny_tokenizer(), max_new_tokens=10**6) for _ in range(2))
    running.answer.deadline = waiting.answer.deadline = 0
    generator.submit([running.answer, waiting.answer])
    for job in (running, waiting):
        assert job.done.wait(30)
        assert isinstance(job.pieces[-1].error, TimeoutError)


def test_failing_step_ends_its_rows_only(start, tiny_tokenizer):
    model = adapt(llama(dtype=torch.float32), ["LoRA", "Prompt"])
    generator, tokenizer = start(model), tiny_tokenizer()
    runner_decode = generator.runner.decode

    def decode(batch):
        if batch.rows[0].adapter_or_base == "Prompt":
            raise MemoryError("no room for the cache")
        return runner_decode(batch)

    generator.runner.decode = decode
    bad, good = Job("Prompt", [7, 8], tokenizer, max_new_tokens=9), Job("LoRA", [7, 8], tokenizer, max_new_tokens=9)
    generator.submit([bad.answer, good.answer])
    assert good.done.wait(30)
    assert good.pieces[-1].finish_reason == "length"
    assert bad.done.wait(30)
    assert isinstance(bad.pieces[-1].error, MemoryError)


def test_nan_ends_its_row_only(start, tiny_tokenizer):
    model = adapt(llama(dtype=torch.float32), ["LoRA", "DoRA"])
    for name, parameter in model.named_parameters():
        if "lora_B.DoRA" in name or "adapters.DoRA" in name:
            parameter.data.fill_(float("nan"))
    generator = start(model)
    bad, good = (Job(name, [7, 8], tiny_tokenizer(), max_new_tokens=9) for name in ("DoRA", "LoRA"))
    generator.submit([bad.answer, good.answer])
    assert bad.done.wait(30)
    assert good.done.wait(30)
    assert "computes NaN or Inf" in str(bad.pieces[-1].error)
    assert good.pieces[-1].finish_reason == "length"


def test_sampling_depends_on_the_seed_only(start, tiny_tokenizer):
    model, prompt = adapt(llama(dtype=torch.float32), ["LoRA", "DoRA"]), make_prompt(1, 5)
    generator = start(model)

    def sample(seed, **params):
        settings = {"max_new_tokens": 12, "top_logprobs": 0, "temperature": 1.5, "seed": seed, **params}
        return Job("LoRA", prompt, tiny_tokenizer(), **settings)

    alone = sample(3)
    generator.submit([alone.answer])
    tokens = alone.result()[0]
    jobs = [
        sample(4),
        Job("DoRA", make_prompt(2, 20), tiny_tokenizer(), max_new_tokens=30),
        sample(3),
        sample(3, top_p=0.1),
    ]
    generator.submit([job.answer for job in jobs])
    other, _, same, narrow = (job.result()[0] for job in jobs)
    assert tokens == same
    assert tokens != other
    assert narrow != tokens


def test_rows_of_a_failed_pass_share_a_batch_again(start, tiny_tokenizer):
    model = adapt(llama(dtype=torch.float32), ["LoRA", "DoRA"])
    plan = [("LoRA", make_prompt(1, 4), 60), ("DoRA", make_prompt(2, 9), 60), (BASE_ROW, make_prompt(3, 2), 60)]
    expected = [generate_alone(model, *each) for each in plan]
    generator, sizes = start(model), []
    decode = generator.runner.decode

    def fail_once(batch):
        sizes.append(len(batch.rows))
        if len(sizes) == 5:
            decode(batch)
            raise RuntimeError("injected")
        return decode(batch)

    generator.runner.decode = fail_once
    jobs = [Job(n, prompt, tiny_tokenizer(), max_new_tokens=c, top_logprobs=0) for n, prompt, c in plan]
    generator.submit([job.answer for job in jobs])
    for job, (tokens, values) in zip(jobs, expected, strict=True):
        found = job.result()
        assert found[0] == tokens
        assert found[1] == pytest.approx(values, abs=2e-5)
    assert set(sizes[5:30]) == {1}
    assert sizes[-5] == 3
