"""What `slimtune export`, `verify`, `merge` and `push` print as JSON. It imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..core.foundation.formatting import format_bytes, format_duration
from ..core.foundation.json_results import INLINE, OMIT_NONE
from .adapter_check.adapter_findings import AdapterFileCheck

EngineCause = Literal[
    "applied", "not-applied", "another-scale", "partly", "another-adapter", "another-base", "another-template",
    "rounding", "not-proven",
]  # fmt: skip
MIN_EFFECT_SHARE = 0.9
"""Share of the adapter's effect in a merged model below which there is a warning."""


@dataclass(frozen=True)
class KeptGain:
    """How much of what training gained on held-out rows is left in few bits.

    Losses are in nats per supervised token; of preference pairs they are the objective's loss per pair.
    """

    rows: int = 0
    """Held-out rows, or pairs, that were measured."""
    tokens: int = 0
    """Their supervised tokens."""
    base_loss: float | None = None
    """Of the base, unrounded; null: not measured, as for the others."""
    tuned_loss: float | None = None
    """Of base and adapter, unrounded."""
    rounded_base_loss: float | None = None
    """Of the base without the adapter in the same precision, in the engine."""
    shipped_loss: float | None = None
    """Of what is shipped, in the engine."""
    share: float | None = None
    """(base_loss - shipped_loss) / (base_loss - tuned_loss); null: not measured."""
    share_ci95: tuple[float, float] | None = None
    """Its 95 % interval, over draws of rows."""
    reason: str = ""
    """Why there is no share."""

    def describe(self) -> str:
        """Return the share with its interval and the losses, or why there is none."""
        if self.share is None or self.share_ci95 is None:
            return f"what is left of the gain on held-out rows: {self.reason}"
        low, high = self.share_ci95
        return (
            f"{self.share:.1%} of what training gained on {self.rows} held-out rows is left ({low:.1%} to {high:.1%}); "
            f"loss of the base {self.base_loss:.4f}, trained {self.tuned_loss:.4f}, this file {self.shipped_loss:.4f}, "
            f"the base rounded alike {self.rounded_base_loss:.4f}"
        )


@dataclass(frozen=True)
class TokenDifference:
    """A token whose log-probability differs."""

    token: str
    """Its text."""
    after: str
    """The end of the text before it."""
    expected: float
    """Its log p by the trained adapter, or by the stage before."""
    found: float
    """Its log p in the engine."""

    def __str__(self) -> str:
        return f"{self.token!r} after {self.after!r}: log p {self.found:.3f}, expected {self.expected:.3f}"


@dataclass(frozen=True)
class EngineVerdict:
    """The result of comparing one engine with the trained adapter; differences, KL and effect in nats."""

    engine: str
    """What was compared."""
    precision: str
    """Of its weights."""
    prompts: int = 0
    """Rendered prompts."""
    prompts_equal: int = 0
    """Prompts that become the same token ids."""
    positions: int = 0
    """Next tokens compared."""
    max_difference: float | None = None
    """Of log p, at the worst position; null: nothing was compared, as for the others."""
    mean_difference: float | None = None
    """Of log p, on average."""
    kl: float | None = None
    """Kullback-Leibler divergence, on average."""
    effect: float | None = None
    """How far the adapter moves log p, on average."""
    strength: float | None = None
    """Share of the effect that arrives; null also if there is no effect."""
    base_max_difference: float | None = None
    """Of the untouched base in this engine; null: not asked."""
    base_mean_difference: float | None = None
    """Of the untouched base in this engine; null: not asked."""
    answers: int = 0
    """Greedy answers."""
    answers_equal: int = 0
    """Answers that are equal token by token."""
    limit: str = ""
    """The tolerance."""
    passed: bool | None = None
    """Whether it is the trained model; null: not checked."""
    cause: EngineCause | None = None
    """What the engine computes; null: nothing was compared."""
    scale: float | None = None
    """Strength at which the engine applies the adapter, if that is the cause; else null."""
    missing: list[str] = field(default_factory=list)
    """Parts of the adapter that the engine lacks, if that is the cause."""
    failed: bool = False
    """Whether a program failed before anything could be compared."""
    reason: str = ""
    """Why it did not pass, or was not checked."""
    evidence: str = "log-probabilities"
    """What it was compared by: log-probabilities, those of its answers, or greedy answers (weaker)."""
    tokens: list[TokenDifference] = field(default_factory=list)
    """Where it differs most, if it did not pass."""
    kept_gain: KeptGain | None = None
    """How much of the held-out gain is left; null: not in few bits."""

    def explain(self) -> str:
        """Return why it did not pass, or was not checked, or how much of the gain is left; "" without either."""
        return self.reason or ("" if self.kept_gain is None else self.kept_gain.describe())


@dataclass(frozen=True)
class ExportResult:
    """What `export --json` prints."""

    run: str
    """The run or adapter folder."""
    out: str
    """The folder that was written."""
    to: str
    """The format."""
    files: dict[str, int]
    """Bytes by name."""
    facts: Mapping[str, Any] = field(metadata=INLINE)
    """Facts of the format, as they are in the manifest."""
    commands: list[str]
    """Shell lines that use the export."""
    notes: list[str]
    """What the user should know, one sentence each."""
    check: EngineVerdict
    """Of the engine; `passed` is null if it could not be checked."""

    def lines(self) -> Iterator[str]:
        """Yield the files, what was lost, and the notes."""
        for file, size in self.files.items():
            yield f"{self.out}/{file}  {format_bytes(size)}"
        if conversion := self.facts.get("conversion"):
            yield f"as a LoRA: {conversion['error']:.2%} of the change is lost"
        if self.check.kept_gain is not None:
            yield f"{self.check.precision}: {self.check.kept_gain.describe()}"
        yield from (f"note: {note}" for note in self.notes)


@dataclass(frozen=True)
class AdapterReport:
    """What `check --json` and `verify --json` print: an adapter's file, and what engines compute with it."""

    path: str
    """The adapter, run or export that was given."""
    passed: bool
    """Whether the file has no fault, and every engine that was asked and could answer computes the trained adapter."""
    file: AdapterFileCheck
    """The check of the adapter's file."""
    checks: list[EngineVerdict]
    """One for each engine or stage, in order; empty: only the file was checked."""
    repair: str | None = None
    """The command that mends it, for an ENGINE; null: nothing to mend, or a fault that only the trainer can mend."""
    first_difference: str | None = None
    """With --stages: the first stage that differs beyond what its precision explains; null: none does."""

    def explain(self) -> Iterator[str]:
        """Yield what each engine computes, what mends the adapter, and what is not proven."""
        for check in self.checks:
            if text := check.explain():
                yield f"{check.engine}: {text}"
            yield from (f"  {each}" for each in check.tokens)
        if self.first_difference:
            yield f"the first stage that differs: {self.first_difference}"
        if self.repair:
            yield f"to mend it: {self.repair}"
        yield from (f"not proven: {text}" for text in self.file.not_proven)

    def explain_failure(self) -> str:
        """Return what is wrong in one line: faults of the file, engines that differ, or could not be asked."""
        differ = [f"{c.engine} ({c.cause})" if c.cause else c.engine for c in self.checks if c.passed is False]
        unknown = [c.engine for c in self.checks if c.passed is None]
        groups = (
            ("the file has faults", self.file.faults), ("not the trained model", differ), ("not proven", unknown),
        )  # fmt: skip
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in groups if names)


@dataclass(frozen=True)
class MergeComparison:
    """How far a merged model is from base and adapter, over next tokens (of a classifier: over logits), in nats."""

    dtype: str
    """Of the merged weights."""
    max_difference: float
    """Of log p between merged and adapted model, at the worst position."""
    mean_difference: float
    """Of log p, on average."""
    effect: float
    """How far the adapter moves the base's log p, on average."""
    strength: float | None
    """Share of the effect that arrives; null if the adapter has none."""
    positions: int
    """Next tokens (texts) compared."""


@dataclass(frozen=True)
class MergedExportFacts:
    """What the manifest of a merged folder says beside the run."""

    comparison: MergeComparison = field(metadata=INLINE)
    """Against base and adapter."""
    fingerprint: str
    """Of the base."""
    adapter_sha256: str | None = field(default=None, metadata=OMIT_NONE)
    """SHA-256 of the adapter's file; absent for a classifier."""


@dataclass(frozen=True)
class MergeResult:
    """What `merge --json` prints."""

    run: str
    """The run or adapter folder."""
    out: str
    """The folder that was written."""
    bytes: int
    """Of all files."""
    parameters: int
    """Numbers of the model."""
    comparison: MergeComparison = field(metadata=INLINE)
    """Against base and adapter."""
    seconds: float
    """That it took."""

    def lines(self) -> Iterator[str]:
        """Yield the size, how far the models differ, and what is left of the adapter's effect."""
        c = self.comparison
        yield (
            f"{self.out}: {format_bytes(self.bytes)} in {c.dtype}, {format_duration(self.seconds)}; merged and adapted "
            f"model differ by {c.mean_difference:.2g} nats on average ({c.max_difference:.2g} at most), where the "
            f"adapter changes the base by {c.effect:.2g}"
        )
        if c.strength is not None:
            yield f"{c.strength:.1%} of the adapter's effect survives in {c.dtype}"

    def warning(self) -> str:
        """Return that too much of the adapter's effect is lost; "" if it is not."""
        c = self.comparison
        if c.strength is None or c.strength >= MIN_EFFECT_SHARE:
            return ""
        return f"{c.dtype} cannot hold so small a change: {1 - c.strength:.0%} of it is lost; --dtype float32 keeps it"


@dataclass(frozen=True)
class PushedCommit:
    """The commit that `slimtune push` made."""

    url: str
    """Of the repository."""
    private: bool
    """Whether only its owner sees it."""
    revision: str
    """The branch."""
    commit: str
    """The commit's hash."""
    commit_url: str
    """The commit's address."""
    created: bool
    """Whether the repository is new."""
    committed: bool
    """Whether there is a new commit."""


@dataclass(frozen=True)
class PushContents:
    """What `slimtune push` uploads."""

    run: str
    """The run, adapter or export."""
    repo_id: str
    """The repository, OWNER/NAME."""
    kind: str
    """What is uploaded: adapter, checkpoint or gguf."""
    base: str | None
    """The base's name in the files."""
    files: dict[str, int]
    """Bytes by name."""
    bytes: int
    """Of all files."""
    eval_file: str | None
    """File of the run with the card's held-out result."""
    skipped: list[str]
    """Files that are not uploaded."""
    notes: list[str]
    """What the user should know, one sentence each."""


@dataclass(frozen=True)
class PushPreview:
    """What `slimtune push RUN OWNER/NAME --dry-run --json` prints."""

    contents: PushContents = field(metadata=INLINE)
    """What would be uploaded."""
    card: str
    """The model card."""

    def lines(self) -> Iterator[str]:
        """Yield the files and the card."""
        yield from _list_files(self.contents)
        yield f"\nnothing was sent; the model card would be:\n\n{self.card}"


@dataclass(frozen=True)
class PushResult:
    """What `push --json` prints."""

    contents: PushContents = field(metadata=INLINE)
    """What was uploaded."""
    pushed: PushedCommit = field(metadata=INLINE)
    """Where it is."""

    def lines(self) -> Iterator[str]:
        """Yield the files and where they are."""
        yield from _list_files(self.contents)
        place = f"{self.pushed.url} ({'private' if self.pushed.private else 'public'}), {self.pushed.revision}"
        count, size = len(self.contents.files), format_bytes(self.contents.bytes)
        yield f"{place} at {self.pushed.commit[:8]}: {count} files, {size}"


def _list_files(contents: PushContents) -> Iterator[str]:
    yield from (f"{name}  {format_bytes(size)}" for name, size in contents.files.items())
    if contents.skipped:
        yield f"not uploaded: {', '.join(contents.skipped)}"
