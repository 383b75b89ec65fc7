"""CorDA and LoRA-GA against peft, their files, and the plain LoRA that equals an adapter with a stored start."""

import peft
import pytest
import torch
from models_zoo import gpt2, llama, run, shake, tokens
from peft.tuners.lora import LoraGAConfig as PeftsLoraGAConfig
from peft.tuners.lora import preprocess_loraga as pefts_preprocess_loraga
from peft.tuners.lora.config import CordaConfig as PeftsCordaConfig
from peft.tuners.lora.corda import preprocess_corda as pefts_preprocess_corda

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model
from slimtune.errors import AdapterError, ConfigError, UsageError
from slimtune.methods.lora.corda import CordaConfig, preprocess_corda
from slimtune.methods.lora.loraga import LoraGAConfig, preprocess_loraga

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-6
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
CORDA = {peft: (PeftsCordaConfig, pefts_preprocess_corda), slimtune: (CordaConfig, preprocess_corda)}
LORA_GA = {peft: (PeftsLoraGAConfig, pefts_preprocess_loraga), slimtune: (LoraGAConfig, preprocess_loraga)}


def corda(home=slimtune, kind=llama, files=None, run_model=True, **more):
    base, (config_class, preprocess) = kind(dtype=torch.float32), CORDA[home]
    files = files or {}
    config = home.LoraConfig(
        init_lora_weights="corda", target_modules=TARGETS[kind.__name__], corda_config=config_class(**files), **more
    )
    preprocess(base, config, (lambda: [base(input_ids=ids[None]) for ids in tokens(rows=3)]) if run_model else None)
    torch.manual_seed(1)
    return home.get_peft_model(base, config).eval()


def lora_ga(home=slimtune, kind=llama, cache_file=None, settings=None, **more):
    base, (config_class, preprocess) = kind(dtype=torch.float32), LORA_GA[home]
    config = home.LoraConfig(
        init_lora_weights="lora_ga",
        target_modules=TARGETS[kind.__name__],
        lora_ga_config=config_class(**(settings or {})),
        **more,
    )

    def train_step():
        for ids in tokens(rows=3):
            base(input_ids=ids[None], labels=ids[None]).loss.backward()

    preprocess(base, config, train_step, cache_file)
    assert all(p.grad is None and p.requires_grad for p in base.parameters())
    torch.manual_seed(1)
    return home.get_peft_model(base, config).eval()


def assert_equal_starts(make):
    ours, theirs = make(slimtune), make(peft)
    mine, other = slimtune.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert all((mine[k] - other[k]).abs().max() < CLOSE for k in other)
    assert (run(ours) - run(theirs)).abs().max() < 10 * CLOSE


@pytest.mark.parametrize(("method", "kind"), [("ipm", llama), ("kpm", llama), ("ipm", gpt2)])
def test_corda_starts_equal_pefts(method, kind):
    ranks = {"r": 4, "rank_pattern": {TARGETS[kind.__name__][0]: 2}}
    assert_equal_starts(lambda home: corda(home, kind, {"corda_method": method}, **ranks))


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_starts_equal_pefts(direction, scale):
    kind = gpt2 if scale == "stable" else llama
    assert_equal_starts(lambda home: lora_ga(home, kind, settings={"direction": direction, "scale": scale}, r=4))


def test_corda_reads_its_files(tmp_path):
    files = {"cache_file": tmp_path / "new" / "cache", "covariance_file": tmp_path / "covariance"}
    model = corda(files=files)
    for name in files:
        again = corda(files={name: files[name]}, run_model=False)
        assert (run(again) - run(model)).abs().max() < CLOSE
        assert torch.equal(again.model.layers[0].self_attn.q_proj.adapters["default"].lora_A.weight,
                           model.model.layers[0].self_attn.q_proj.adapters["default"].lora_A.weight)  # fmt: skip
    files["cache_file"].write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UsageError, match="safetensors"):
        corda(files=files)


def test_lora_ga_reads_its_file(tmp_path):
    first, second = (slimtune.get_peft_model_state_dict(lora_ga(cache_file=tmp_path / "new" / "file")) for _ in "12")
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_without_data_it_is_refused(init):
    config = LoraConfig(init_lora_weights=init, target_modules=["q_proj"], lora_ga_config={}, r=4)
    with pytest.raises(ConfigError, match=f"init_lora_weights='{init}'"):
        get_peft_model(llama(), config)


@pytest.mark.parametrize("make", [corda, lora_ga])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_equal_plain_lora_is_saved(make, rslora, tmp_path):
    patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"0.self_attn.q_proj": 5}}
    model = make(r=4, lora_alpha=16, use_rslora=rslora, **patterns)
    model.save_pretrained(tmp_path / "start")
    shake(model)
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    base = llama(dtype=torch.float32)
    assert (run(PeftModel.from_pretrained(base, tmp_path / "own")) - run(model)).abs().max() < 10 * CLOSE
    plain = peft.PeftModel.from_pretrained(llama(dtype=torch.float32), tmp_path / "plain")
    assert plain.peft_config["default"].r == 8
    assert (run(plain) - run(model)).abs().max() < 10 * CLOSE


def test_pefts_file_of_a_lora_ga_is_refused(tmp_path):
    lora_ga(peft).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="start"):
        PeftModel.from_pretrained(llama(dtype=torch.float32), tmp_path)


def test_a_plain_adapter_has_no_start_to_convert(tmp_path):
    model = get_peft_model(llama(), LoraConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="LoraConfig"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path)
