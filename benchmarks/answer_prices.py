"""Write hardware/answer_prices.csv, what services take for answers of bases that plans know: `answer_prices.py DATE`.

The prices are those of the package genai-prices (`pip install genai-prices` first), which collects them from the
services' own pages; DATE is the day of its release. Of a service that has a base several times the cheapest is taken.
"""

import csv
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genai_prices.data import providers

from slimtune.extras.known_models import find_known_base

FILE = Path(__file__).parents[1] / "src/slimtune/hardware/answer_prices.csv"
SERVICES = ("baseten", "cerebras", "cloudflare", "fireworks", "groq", "novita", "openrouter", "ovhcloud", "together")
SUFFIX = re.compile(r"-(turbo|lite|instant|versatile|fp8|fast|instruct-turbo)$")


def find_alias(name: str) -> str | None:
    """Return the alias of the base that a service's name of a model means; None: of none that plans know."""
    last = name.split("/")[-1]
    found = next((b for n in (name, last, SUFFIX.sub("", last.lower())) if (b := find_known_base(n))), None)
    return found.alias if found is not None else None


def find_prices() -> Iterator[tuple[str, str, float, float, str]]:
    """Yield base, service, dollars for a million read and written tokens, and the service's page."""
    for provider in (p for p in providers if p.id in SERVICES):
        for model in provider.models:
            prices: Any = model.prices[-1].prices if isinstance(model.prices, list) else model.prices
            read, written = prices.input_mtok, prices.output_mtok
            plain = all(isinstance(n, int | float) or hasattr(n, "as_tuple") for n in (read, written))
            if plain and read and written and (alias := find_alias(model.id)) is not None:
                yield alias, provider.name, float(read), float(written), (provider.pricing_urls or [""])[0]


def main() -> None:
    (date,) = sys.argv[1:]
    cheapest: dict[tuple[str, str], tuple[float, float, str]] = {}
    for alias, service, read, written, page in find_prices():
        key = (alias, service)
        cheapest[key] = min(cheapest.get(key, (read, written, page)), (read, written, page), key=lambda p: p[1])
    with FILE.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["base", "service", "dollars_read", "dollars_written", "date", "source"])
        for (alias, service), (read, written, page) in sorted(cheapest.items()):
            rows.writerow([alias, service, read, written, date, f"{page}, by genai-prices {version('genai-prices')}"])


if __name__ == "__main__":
    main()
