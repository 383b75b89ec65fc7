"""Every family does what docs/families.md says: attach, train, reload, PEFT's logits, merge, packing, plan and run.

`--update-families` writes what the families do into family_table.json; `make_families.py` prints the page.
"""

import pytest
from family_table import FAMILIES, check_steps, read_table, write_row

FAST = ("llama",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]
)
def test_family(family, tmp_path, tiny_tokenizer, request):
    found = check_steps(family, tmp_path, tiny_tokenizer())
    if request.config.getoption("--update-families"):
        write_row(family, found)
    assert found == {step: what for step, what in read_table()[family].items() if step in found}


def test_every_family_is_in_the_table():
    assert list(read_table()) == FAMILIES
