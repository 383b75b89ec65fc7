"""`slimtune benchmarks`: the serving speeds that others published."""

from collections import Counter
from typing import Annotated, Any

from typer import Option

from .common import Json, make_console, make_table


def benchmarks_table(
    gpu: Annotated[str | None, Option(help="Only of this GPU or Mac.")] = None,
    model: Annotated[str | None, Option(help="Only of this base, by its short name.")] = None,
    engine: Annotated[str | None, Option(help="Only of this engine: llama.cpp, ollama, mlx, vllm or sglang.")] = None,
    sources: Annotated[bool, Option("--sources", help="Show where and when each was published.")] = False,
    as_json: Json = False,
) -> Any:
    """List serving speeds that others published, by GPU and base: those that plans are fitted to and judged by.

    Without --gpu and --model, the GPUs with the number of speeds of each.
    """
    from ..planning.published_speeds import PublishedSpeedsResult, list_published_speeds

    speeds = list_published_speeds(gpu, model, engine)
    if not as_json and gpu is None and model is None:
        bases: dict[str, set[str]] = {}
        for speed in speeds:
            bases.setdefault(speed.gpu, set()).add(speed.model)
        counts = Counter(speed.gpu for speed in speeds)
        rows = ((name, str(count), str(len(bases[name]))) for name, count in sorted(counts.items()))
        make_console().print(make_table("GPU", "speeds", "bases", rows=rows))
    elif not as_json:
        columns = ("GPU", "base", "engine", "precision", "test", "tokens", "tokens/s")
        cells = (
            (s.gpu, s.model, s.engine, s.precision, s.test, str(s.tokens), f"{s.tokens_per_second:.1f}") for s in speeds
        )
        make_console().print(make_table(*columns, text_column_indices=[1, 2, 3, 4], rows=cells))
        if sources:
            found = dict.fromkeys((s.source, s.date) for s in speeds)
            make_console().print("\n" + "\n".join(f"{date}  {source}" for source, date in found), soft_wrap=True)
    return PublishedSpeedsResult(speeds)
