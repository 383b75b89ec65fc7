"""Activated LoRA against peft, and which tokens it changes: in a cache, in packed rows, under checkpointing."""

import peft
import pytest
import torch
from adapter_checks import distance
from models_zoo import llama, run, shake, t5, tokens

import slimtune
from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.core.adapters.adapter_tensors import get_adapter_tensors
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.training.loss import compute_supervised_token_nll, make_collator
from slimtune.core.training.memory_savings import enable_tiled_mlp
from slimtune.errors import UsageError
from slimtune.methods.lora.alora import calculate_alora_offsets

# transformers 5.2x renamed past_key_values, which earlier releases have alone.
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
CLOSE = 1e-9
INVOCATION = [5, 6]
SETTINGS = {
    "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "alora_invocation_tokens": INVOCATION,
    "init_lora_weights": False, "task_type": "CAUSAL_LM",
}  # fmt: skip


def ids_with_invocations():
    """Rows with the invocation at 3, at 1 and 6, and nowhere."""
    ids = tokens(rows=3) % 100 + 10
    ids[0, 3:5] = ids[1, 1:3] = ids[1, 6:8] = torch.tensor(INVOCATION)
    return ids


def adapted(home=slimtune, **more):
    base = llama()
    torch.manual_seed(1)
    return home.get_peft_model(base, home.LoraConfig(**SETTINGS, **more), autocast_adapter_dtype=False).eval()


def both():
    theirs, ours = adapted(peft), adapted()
    slimtune.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours, theirs


def test_logits_and_gradients_equal_pefts():
    ids, found = ids_with_invocations(), []
    for model in both():
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found.append((out.logits.detach(), [p.grad for n, p in model.named_parameters() if p.grad is not None]))
    (mine, my_grads), (other, their_grads) = found
    assert distance(mine, other) < CLOSE
    assert all(distance(a, b) < CLOSE for a, b in zip(my_grads, their_grads, strict=True))
    assert my_grads


def test_tokens_before_the_last_invocation_are_the_bases():
    model, ids = adapted(), ids_with_invocations()
    changed = (run(model, ids) - run(llama(), ids)).abs().amax(-1) > 0
    assert [row.nonzero()[:, 0].tolist() for row in changed] == [[3, 4, 5, 6, 7, 8], [6, 7, 8], []]
    assert calculate_alora_offsets(model.peft_config, "default", ids) == [6, 3, None]
    assert torch.equal(model.forward(input_ids=ids).logits, run(model, ids))
    assert distance(model(input_ids=ids, alora_offsets=[2, None, 9]).logits[0], run(model, ids)[0]) > 1e-6


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_pefts(use_cache):
    ids = torch.cat([tokens(rows=3)[:, :2] * 0, ids_with_invocations()], 1)  # padded on the left
    ids[1, :6] = 0
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mine, other = (
        m.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **settings)
        for m, cache in zip(both(), (use_cache, True), strict=True)  # without a cache, peft's tokens move on
    )
    assert torch.equal(mine.sequences, other.sequences)
    assert max(distance(a, b) for a, b in zip(mine.logits, other.logits, strict=True)) < CLOSE


def test_a_continued_cache_equals_the_whole_sequence():
    model, ids = adapted(), ids_with_invocations()[:1]
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    with torch.no_grad():  # the base's cache, then the invocation, then one more call
        for part in (ids[:, 3:6], ids[:, 6:]):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
    assert distance(logits, run(model, ids)[:, 6:]) < CLOSE


def test_rows_of_a_mixed_batch():
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 3}
    named = {"late": {**SETTINGS}, "other": {**SETTINGS, "alora_invocation_tokens": [7]}, "all": settings}
    model, ids = get_peft_model(llama(), LoraConfig(**named["late"]), "late"), ids_with_invocations()[:2].repeat(2, 1)
    ids[2, 2] = 7
    for name in ("other", "all"):
        model.add_adapter(name, LoraConfig(**named[name]))
    model.set_adapter(list(named))
    shake(model.eval())
    names = ["late", "all", "other", "__base__"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names[:3]):
        model.set_adapter(name)
        assert distance(mixed[row], run(model, ids[row : row + 1])[0]) < CLOSE
    assert distance(mixed[3], run(llama(), ids[3:])[0]) < CLOSE


def test_packed_rows_equal_rows_alone():
    model, ids = adapted(), ids_with_invocations()
    rows = [{"input_ids": r.tolist(), "labels": r.tolist()} for r in (ids[0], ids[2], ids[1, :7], ids[1])]
    collator = make_collator(model, 0)
    assert (collator.with_packed_layout, collator.share_prefix) == (True, False)
    with torch.no_grad(), using_packed_attention(model):
        packed = compute_supervised_token_nll(model, collator(rows))
    alone = torch.cat(
        [compute_supervised_token_nll(model, make_collator(model, 0, packing=False)([row])).detach() for row in rows]
    )
    assert distance(packed, alone) < CLOSE
    batch = make_collator(llama(), 0)([{k: [9] * 9 + v for k, v in row.items()} for row in rows])  # shares 9 tokens
    with using_packed_attention(model), pytest.raises(UsageError, match="share a prefix"):
        compute_supervised_token_nll(model, batch)


def test_checkpointed_layers_are_recomputed_with_the_tokens_of_their_call():
    grads = []
    for checkpointing in (False, True):
        model, ids = adapted().train(), ids_with_invocations()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(input_ids=i, labels=i).loss for i in (ids, ids.flip(0), ids[2:])]
        sum(losses).backward()
        grads.append([t.grad for t in get_adapter_tensors(model, "default").values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_cannot_be_done_is_refused():
    model = adapted()
    with pytest.raises(MergeUnsupported):
        model.merge_adapter()
    with pytest.raises(UsageError, match="outside a call"):
        model.model.layers[0].mlp(torch.zeros(1, 2, 32, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"LoRA.*tiles"):
        enable_tiled_mlp(model, 4)
    with pytest.warns(UserWarning, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32, dtype=torch.float64))
    with pytest.raises(UsageError, match="alora_invocation_tokens"):
        get_peft_model(t5(), LoraConfig(alora_invocation_tokens=[1]))


def test_rows_without_the_invocation_are_named():
    config = LoraConfig(**SETTINGS)
    rows = [{"input_ids": [1, 5, 6, 7]}, {"input_ids": [5, 7, 6]}]
    with pytest.warns(UserWarning, match=r"1 of 2 .*alora_invocation_tokens \[5, 6\]"):
        config.check_rows(rows)
    with pytest.raises(UsageError, match=r"1 of 1 .*alora_invocation_tokens"):
        config.check_rows(rows[1:])
