"""report.html: one file, no network: what was asked, the curves, the sizes, the versions."""

from __future__ import annotations

import html
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from .. import __version__
from ..build import Rows
from ..recipe import Recipe
from ..runs import RunFolder, write_atomic
from ..units import bytes_text, count_text, seconds_text
from .relief import EVENT, Event

Points = Sequence[tuple[float, float]]


def write_report(run: RunFolder, recipe: Recipe, result: dict[str, Any], matched: object, rows: Rows) -> None:
    """Write the run's report.html."""
    metrics = run.metrics()
    train = [(m["step"], m["train_loss"]) for m in metrics if m.get("train_loss") is not None]
    held = [(m["step"], m["validation_loss"]) for m in metrics if m.get("validation_loss") is not None]
    name = html.escape(run.path.name)
    shown = [
        ("trained tokens/s", f"{result['tokens_per_second']:.0f}"),
        ("adapter", bytes_text(result["adapter_bytes"])),
        ("parameters trained", f"{100 * result['trainable_params'] / result['total_params']:.2f} %"),
    ]
    if result["validation_loss"] is not None:
        shown.insert(0, ("validation loss", f"{result['validation_loss']:.3f}"))
    body = [
        f"<h1>{name}</h1>",
        f"<p>{html.escape(recipe.model.name)} · {html.escape(recipe.method.name)} · slimtune {__version__}</p>",
        '<div class="big">' + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in shown) + "</div>",
        '<h2>Loss</h2><p>nats per supervised token; <span class="one">training</span>, '
        '<span class="two">validation</span></p>',
        curves(train, held),
        "<h2>Result</h2>" + _table(_result_rows(result)),
        *memory(metrics),
        "<h2>Data</h2>"
        + _table(
            [
                ("training rows", rows.train_report.text()),
                (
                    "validation rows",
                    rows.validation_report.text()
                    if rows.validation_report
                    else f"{len(rows.validation)} set aside from the training rows",
                ),
            ]
        ),
        "<h2>What was adapted</h2><p>" + html.escape(str(matched)) + "</p>",
        "<h2>Settings</h2><pre>" + html.escape(recipe.to_yaml()) + "</pre>",
        "<h2>Versions</h2>" + _table(versions()),
    ]
    style = files(__package__).joinpath("report.css").read_text()
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{name}</title><style>{style}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    write_atomic(run.report_file, page)


def curves(train: Points, held: Points, width: int = 720, height: int = 300) -> str:
    """Return an SVG of two loss curves over steps; each is `(step, loss)` points."""
    every = [p for p in [*train, *held] if math.isfinite(p[1])]
    if not every:
        return "<p>no loss was logged</p>"
    left, right, top, bottom = 48, 12, 10, 30
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    y0, y1 = min(y for _, y in every), max(y for _, y in every)
    y0, y1 = (y0, y1) if y1 > y0 else (y0 - 0.5, y1 + 0.5)

    def at(x: float, y: float) -> str:
        px = left + (x - x0) / max(1e-9, x1 - x0) * (width - left - right)
        py = top + (y1 - y) / (y1 - y0) * (height - top - bottom)
        return f"{px:.1f},{py:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over steps">']
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        py = float(at(x0, y).split(",")[1])
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py}" y2="{py}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{py + 4}" text-anchor="end" font-size="12" fill="var(--soft)">{y:.2f}</text>'
        )
    for x, anchor in ((x0, "start"), (x1, "end")):
        px = float(at(x, y0).split(",")[0])
        parts.append(
            f'<text x="{px}" y="{height - 8}" text-anchor="{anchor}" font-size="12" fill="var(--soft)">'
            f"step {x:g}</text>"
        )
    for points, colour, wide in ((train, "--one", 1.5), (held, "--two", 2.5)):
        line = " ".join(at(x, y) for x, y in points if math.isfinite(y))
        if line:
            parts.append(f'<polyline points="{line}" fill="none" stroke="var({colour})" stroke-width="{wide}"/>')
        if colour == "--two":
            parts += [
                f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3.5" fill="var({colour})"/>'
                for p in line.split()
            ]
    return "".join(parts) + "</svg>"


def memory(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Return what became of memory that ran out, as a section; nothing where it did not."""
    found = [Event(**{k: v for k, v in m.items() if k != "event"}) for m in metrics if m.get("event") == EVENT]
    if not found:
        return []
    return ["<h2>Memory ran out</h2>" + _table([(f"after step {e.step}", f"{e.text()} ({e.error})") for e in found])]


def versions() -> list[tuple[str, str]]:
    """Return the versions of what took part."""
    found = [("python", platform.python_version()), ("machine", f"{platform.machine()}, {platform.system()}")]
    for package in ("slimtune", "torch", "transformers", "accelerate", "safetensors", "peft"):
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, "not installed"))
    return found


def _result_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("steps", f"{r['steps']} (adapter of step {r['best_step']}{', stopped early' if r['stopped_early'] else ''})"),
        ("trained tokens", f"{r['trained_tokens']:,} ({r['supervised_tokens']:,} supervised)"),
        ("training steps took", seconds_text(r["train_seconds"])),
        ("loading the base took", seconds_text(r["load_seconds"])),
        ("first-time dequantization took", seconds_text(r["prepare_seconds"])),
        ("parameters trained", f"{count_text(r['trainable_params'])} of {count_text(r['total_params'])}"),
        ("adapter", f"{r['adapter_bytes']:,} bytes"),
        ("peak memory", bytes_text(r["peak_bytes"])),
        ("weights", f"{r['dtype']} on {r['device']}"),
    ]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows)
        + "</table>"
    )
