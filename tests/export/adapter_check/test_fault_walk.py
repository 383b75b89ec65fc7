"""Each silent fault of a file is walked through PEFT and back; docs/silent_faults.md is made of what is recorded."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from chatml import CHATML
from fault_walk import walk_fault
from test_repaired_adapters import MORE_FAULTS, REPAIRED
from test_silent_faults import FAULTS

RECORD = Path(__file__).parent / "fault_walks.json"
ALL = {**FAULTS, **MORE_FAULTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_walk_is_as_recorded(adapter_copy, tiny_tokenizer, tmp_path, request, name):
    base, folder = adapter_copy(ALL[name][1])
    tiny_tokenizer(chat_template=CHATML).save_pretrained(base)
    ALL[name][3](folder)
    found = asdict(walk_fault(base, folder, tmp_path / "out"))
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if request.config.getoption("--update-screens"):
        RECORD.write_text(json.dumps(dict(sorted({**recorded, name: found}.items())), indent=1) + "\n")
    else:
        assert found == recorded[name]


def test_every_fault_is_named_and_what_is_repaired_is_computed_as_trained():
    walks = json.loads(RECORD.read_text())
    assert walks.keys() == ALL.keys()
    assert [name for name, walk in walks.items() if ALL[name][0] not in walk["file"]] == []
    # The server has the base's template, whatever lies beside the repaired adapter.
    assert [name for name in REPAIRED if walks[name]["repaired"] != "applied"] == ["other-template"]
