"""What may spoil a run: each check looks at the facts of a file's rows and yields what it finds.

`find_data_issues` adds what batches found in single rows, and decides by the share of the rows what is an error.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from ...core.data.tokenize import PARAGRAPH_HINT
from ...core.foundation.formatting import format_count
from ...errors import format_names
from ...extras.row_files import describe_effect_of_ignoring_columns, make_unused_column_hint
from ...extras.row_formats.classification import (
    describe_lookalike_label,
    normalize_label_case_and_unicode,
    sort_class_names,
)
from .data_report import DataIssue, PairLengthCounts
from .near_duplicates import (
    SHORT_ANSWER,
    THRESHOLD,
    Array,
    combine_three_hashes,
    find_repeat_and_first_positions,
    match_minhash_signatures,
)
from .row_facts import PAIR_FORMATS, SHOWN_LINES, AffectedRows, RowFacts
from .swapped_texts import find_lines_with_swapped_sides

SAME_ANSWER_ROWS = 10
"""Fewest rows with the same answer that are an issue."""
RARE_CLASS_ROWS = 5
"""Fewer rows of a class are an issue."""
LENGTH_LEAK = 0.65
"""Share of pairs that the length of their answers decides, from whose lower bound on it is an issue."""
SHOWN_GROUPS = 4
"""Groups of labels that look alike that people see."""
IMBALANCE = 10
"""How many times as many rows the most frequent class has as one whose rows are an issue."""


@dataclass(frozen=True)
class FindingType:
    """Which rows have something, and what to do about it.

    `error_from_share` is the share of all rows from which it is an error (0: a single row); None: always a warning.
    """

    description: str
    hint: str
    error_from_share: float | None = None


FINDING_TYPES = {
    "unused-column": FindingType("rows with a column that changes what they mean and is not used", "", 0),
    "no-supervised-token": FindingType("rows without a supervised token", "remove these rows", 0),
    "doubled-bos": FindingType("rows that begin with the beginning-of-sequence token twice",
        "remove it from the text or from the template", 0),
    "missing-end": FindingType("rows whose last turn has no end-of-turn token: the model does not learn to stop",
        "use a chat template that ends turns with a special token (data.chat_template)", 0.5),
    "control-token-in-text": FindingType(
        "rows with a control token of this base typed in a message, which the model reads as the token itself",
        "remove the token from the text, or break it up", 0.001),
    "already-rendered": FindingType(
        "rows with a message that a chat template has already rendered: it would be rendered twice",
        "use the messages from before that template; texts of pairs and ratings: --no-apply-chat-template reads them "
        "as they are", 0.02),
    "special-token-as-text": FindingType(
        "documents with a special token of this base typed in their text, which is read as ordinary text",
        "keep them, if they are about the token; if it should be the token itself: --no-split-special-tokens "
        "(data.split_special_tokens: false)"),
    "special-token-in-document": FindingType(
        "documents with a special token of this base typed in their text, which the model reads as the token itself",
        "leave out --no-split-special-tokens (data.split_special_tokens: true), unless this is what you want"),
    "repeated-prompt": FindingType(
        "pairs of texts that both begin with the text of their prompt: it is read once",
        "leave the prompt out of the answers; if they should begin with these words, put the prompt before them twice"),
    "prompt-in-answer": FindingType(
        "pairs of which a text begins with the words of its prompt, or its question: they are learned in that answer",
        "if the prompt is repeated, remove it from the answer", 0.1),
    "prompt-in-completion": FindingType(
        "rows whose completion begins with the words of its prompt: they are learned, too",
        "if the prompt is repeated, remove it from the completion"),
    "different-turns": FindingType(
        "pairs whose answers go on with different user or system messages: what is learned of them depends on these",
        "end both answers before the first turn of the user that differs", 0.5),
    "no-prompt": FindingType("pairs whose answers have no prompt: they share no beginning",
        "write the prompt before both answers, or into a column 'prompt'", 0.5),
    "swapped-roles": FindingType(
        "conversations that the assistant begins and the user ends: the roles may be swapped",
        "swap 'user' and 'assistant', if the assistant's turns are the questions", 0.9),
    "swapped-texts": FindingType(
        "rows whose question and answer are perhaps swapped: each reads like the other one of the file's other rows",
        "look at these rows, and swap the two texts if they are"),
    "unbalanced-thinking": FindingType(
        "rows with <think> without </think>, or the other way round; the chat template has no thinking, so that the "
        "tag is learned as text", "complete the tag, or remove it"),
    "too-long": FindingType("rows longer than max_seq_len", "a larger --max-seq-len, or shorter rows", 0.9),
    "duplicate": FindingType("rows that repeat an earlier row", "remove them, unless they should count more"),
    "near-duplicate": FindingType("rows that nearly repeat an earlier row", "remove them, unless they are intended"),
    "contradiction": FindingType("rows with another short answer to a prompt than an earlier row",
        "keep the right answer"),
    "one-class": FindingType("rows of one class only: there is nothing to tell apart", "add rows of another class", 0),
    "contradictory-pair": FindingType("pairs that prefer the answer which an earlier pair of the same prompt rejects",
        "keep the right one of the two"),
    "length-leak": FindingType("pairs whose answer can be chosen by its length: a model may learn the length alone",
        "add pairs whose better answer is the other one, or compare answers per token (task simpo, or dpo with "
        "loss_type sigmoid_norm)"),
    "one-label": FindingType("rows with the same label: KTO learns from good and from bad answers",
        "add rows with the other label"),
    "contradictory-label": FindingType("rows with another label for a text than an earlier row",
        "keep the right label"),
    "similar-labels": FindingType("rows with labels that look alike: they differ in upper case, white space, invisible "
        "characters or the form of letters alone, and are classes of their own",
        "write each class in one way"),
    "rare-class": FindingType(f"rows of a class with fewer than {RARE_CLASS_ROWS} rows", "more rows of these classes"),
    "class-imbalance": FindingType("rows of classes that are much rarer than the most frequent one",
        "class_weights: balanced, and compare macro-F1 rather than accuracy"),
    "unseen-label": FindingType("validation rows with a label that no training row has",
        "correct the label, or add training rows of this class", 0),
    "same-answer": FindingType("rows with the same answer to different prompts", "keep a few of them", 0.95),
    "media-placeholder": FindingType("rows with a place for an image or a sound in their text: only text is learned",
        "remove them, or say in words what it shows", 0.02),
    "other-prompt": FindingType(
        "rows whose last answer is learned after another text than generation begins it with; a template that ends "
        "its prompt with <think> does so", "write what is thought into the rows, or use a template whose prompt ends "
        "where an answer begins (data.chat_template)"),
    "short-document": FindingType("documents of fewer than two tokens, from which nothing is learned but their end",
        "remove them, or join them to others"),
    "placeholder-answer": FindingType("rows with a placeholder as the answer", "remove them, or write an answer", 0.5),
    "same-pair": FindingType("preference pairs whose two answers are the same", "remove them", 0),
    "empty-answer": FindingType("preference pairs with an answer that has no token of its own", "remove them", 0),
    "overlap": FindingType("rows that are also validation rows: the validation loss would look too good",
        "remove them from one of the two files", 0.01),
    "near-overlap": FindingType("rows that nearly repeat a validation row", "remove them from one of the two files"),
    "validation-invalid": FindingType("invalid validation rows", "run slimtune data on the validation file", 0),
    "mojibake": FindingType("rows with text that was decoded with the wrong encoding (“Ã©” for “é”)",
        "decode the source as UTF-8, or repair it with ftfy", 0.1),
    "replacement-character": FindingType("rows with U+FFFD, which replaces characters that were lost",
        "decode the source with its own encoding", 0.1),
    "null-byte": FindingType("rows with a null character", "read the source with its own encoding (UTF-16?)", 0.1),
    "control-character": FindingType("rows with control characters", "remove them"),
    "byte-order-mark": FindingType("rows with a byte order mark inside their text", "remove it"),
    "html-entity": FindingType("rows of plain text with HTML entities", "unescape them (html.unescape)"),
    "mixed-script": FindingType("rows with words that mix Latin and Cyrillic letters that look alike",
        "write each word in one script"),
}  # fmt: skip
"""Findings by code, in the order of the report. A code that is not here is the code of an `InvalidRow`: an error."""
INVALID_ROW = FindingType("", "repair or remove these rows", 0)


class RowFinding(NamedTuple):
    """Rows with something that a code of `FINDING_TYPES`, or of an `InvalidRow`, names."""

    code: str
    rows: AffectedRows


Check = Callable[[RowFacts], Iterator[RowFinding]]


def find_data_issues(facts: RowFacts) -> list[DataIssue]:
    """Return what may spoil a run: errors first, invalid rows before what `FINDING_TYPES` names, in its order."""
    found = dict(facts.groups)
    found |= {finding.code: finding.rows for check in CHECKS for finding in check(facts)}
    codes = [*sorted(found.keys() - FINDING_TYPES), *(code for code in FINDING_TYPES if code in found)]
    issues = [make_data_issue(RowFinding(code, found[code]), facts.stats.rows, facts.on_overlong) for code in codes]
    return sorted(issues, key=lambda issue: issue.severity)


def make_data_issue(finding: RowFinding, file_row_count: int, on_overlong: str = "drop") -> DataIssue:
    """Return a finding with its severity, by its share of the file's rows."""
    (code, group), kind = finding, FINDING_TYPES.get(finding.code, INVALID_ROW)
    refused = code == "too-long" and on_overlong == "error"
    is_error = refused or (kind.error_from_share is not None and group.count >= kind.error_from_share * file_row_count)
    example = f" ({group.example})" if kind.description and group.example else ""
    what = f"{kind.description}{example}" or group.example
    severity: Literal["error", "warning"] = "error" if is_error else "warning"
    return DataIssue(code, severity, what, group.lines, group.count, group.hint or kind.hint)


def _make_finding(code: str, lines: Array, example: str = "") -> Iterator[RowFinding]:
    """Yield the finding for these rows, if there are any."""
    if len(lines):
        group = AffectedRows()
        group.add(lines, example)
        yield RowFinding(code, group)


def _make_pair_finding(
    code: str, lines: Array, matches: Array, prefix: str = "", relation: str = "as"
) -> Iterator[RowFinding]:
    """Yield the finding for rows that each have a match, if there are any."""
    if len(lines):
        yield from _make_finding(code, lines, f"{prefix}line {lines[0]} {relation} line {matches[0]}")


# --- columns and lengths ----------------------------------------------------------------------------------------------


def _check_columns(facts: RowFacts) -> Iterator[RowFinding]:
    """Rows mean something else without a column that is not used."""
    if columns := facts.source.lossy_columns:
        first = max(columns, key=lambda c: c.row_count)
        yield RowFinding(
            "unused-column",
            AffectedRows(
                first.row_count,
                [first.line],
                describe_effect_of_ignoring_columns(columns),
                make_unused_column_hint(columns),
            ),
        )


def _check_lengths(facts: RowFacts) -> Iterator[RowFinding]:
    """Rows are too long: what happens to them, and how long the longest is."""
    if (rows := facts.groups.get("too-long")) is None:
        return
    consequence = {"error": "training refuses them", "drop": "left out", "truncate": "truncated at the end"}
    limit, longest = facts.stats.max_seq_len, facts.stats.longest
    example = f"{limit} tokens; {consequence[facts.on_overlong]}; the longest has {longest}"
    hint = f"{PARAGRAPH_HINT}, or a larger --max-seq-len" if facts.source.has_paragraphs else ""
    yield RowFinding("too-long", replace(rows, example=example, hint=hint))


# --- rows that are like other rows ------------------------------------------------------------------------------------


def _check_duplicates(facts: RowFacts) -> Iterator[RowFinding]:
    """Rows repeat an earlier row, or nearly."""
    lines, texts = facts.stats_by_row["line"], facts.stats_by_row["hashes"][:, 0]
    repeated, first = find_repeat_and_first_positions(texts)
    yield from _make_pair_finding("duplicate", lines[repeated], lines[first])
    near, match = (facts.comparable_rows[rows] for rows in match_minhash_signatures(facts.signatures))
    new = ~np.isin(near, repeated)
    prefix = f"similarity from {THRESHOLD}: "
    yield from _make_pair_finding("near-duplicate", lines[near[new]], lines[match[new]], prefix)


def _check_swapped_texts(facts: RowFacts) -> Iterator[RowFinding]:
    """Question and answer of some rows are perhaps swapped."""
    yield from _make_finding("swapped-texts", np.array(find_lines_with_swapped_sides(facts.sides), np.int64))


def _check_contradictions(facts: RowFacts) -> Iterator[RowFinding]:
    """Rows have another short answer, or another label, than an earlier row with the same prompt."""
    rows = facts.stats_by_row
    if facts.source.format in PAIR_FORMATS:
        return
    lines, words, (_, prompts, answers) = rows["line"], rows["words"], rows["hashes"].T
    again, before = find_repeat_and_first_positions(prompts)
    other = (answers[again] != answers[before]) & (prompts[again] != 0)
    other &= (words[again] <= SHORT_ANSWER) & (words[before] <= SHORT_ANSWER)
    code = "contradictory-label" if _is_labelled(facts) else "contradiction"
    yield from _make_pair_finding(code, lines[again[other]], lines[before[other]])


def _check_same_answers(facts: RowFacts) -> Iterator[RowFinding]:
    """Many rows have one answer to different prompts."""
    lines, words, (_, prompts, answers) = (
        facts.stats_by_row["line"], facts.stats_by_row["words"], facts.stats_by_row["hashes"].T,
    )  # fmt: skip
    if _is_labelled(facts):
        return
    # A label or a yes may be the answer of half of the rows, a whole sentence not of a tenth.
    values, first, counts = np.unique(answers, return_index=True, return_counts=True)
    least = np.maximum(np.where(words[first] > SHORT_ANSWER, 0.1, 0.95) * len(answers), SAME_ANSWER_ROWS)
    found = AffectedRows()
    for value in values[(counts >= least) & (values != 0)]:
        rows = np.flatnonzero(answers == value)
        different = len(np.unique(prompts[rows]))
        if different >= max(SAME_ANSWER_ROWS, len(rows) / 2):
            share = f"{100 * len(rows) / len(answers):.0f} % of the rows"
            found.add(lines[rows], f"one answer to {format_count(different)} prompts, {share}")
    if found.count:
        yield RowFinding("same-answer", found)


def _is_labelled(facts: RowFacts) -> bool:
    return facts.source.format in ("classification", "unpaired-preference")


# --- pairs ------------------------------------------------------------------------------------------------------------


def _check_contradictory_pairs(facts: RowFacts) -> Iterator[RowFinding]:
    """Pairs prefer the answer that an earlier pair of the same prompt rejects."""
    rows = facts.stats_by_row
    if facts.source.format not in PAIR_FORMATS or not len(rows):
        return
    _, prompts, better = rows["hashes"].T
    keys, swapped = (
        combine_three_hashes(prompts, *pair) for pair in ((better, rows["worst"]), (rows["worst"], better))
    )
    order = np.argsort(keys, kind="stable")
    # the first row that is the reverse of each, if there is one
    place = order[np.searchsorted(keys[order], swapped).clip(max=len(keys) - 1)]
    later = np.flatnonzero((keys[place] == swapped) & (place < np.arange(len(keys))) & (keys != swapped))
    matches = rows["line"][place[later]]
    yield from _make_pair_finding("contradictory-pair", rows["line"][later], matches, relation="contradicts")


def _check_answer_lengths(facts: RowFacts) -> Iterator[RowFinding]:
    """The better answer of most pairs is the longer one, or the shorter one: a model may learn the length alone."""
    if (pairs := count_pairs_by_longer_answer(facts)) is None:
        return
    decided, (low, high) = pairs.better_longer + pairs.better_shorter, pairs.longer_share_ci95
    difference = facts.stats_by_row["answer_tokens"] @ [1, -1]
    for name, part, (least, most) in (
        ("longer", difference > 0, (low, high)),
        ("shorter", difference < 0, (1 - high, 1 - low)),
    ):
        if least > LENGTH_LEAK:
            of_all = f"the {name} answer is the better one in {part.sum():,} of {decided:,}"
            interval = f"95 % interval {100 * least:.0f} to {100 * most:.0f} %"
            yield from _make_finding("length-leak", facts.stats_by_row["line"][part], f"{of_all}, {interval}")


def count_pairs_by_longer_answer(facts: RowFacts) -> PairLengthCounts | None:
    """Return how often the better answer is the longer one; None: the rows are no pairs, or have no tokens."""
    rows = facts.stats_by_row
    if facts.source.format not in PAIR_FORMATS or not len(rows):
        return None
    difference = rows["answer_tokens"] @ [1, -1]
    longer, shorter = int((difference > 0).sum()), int((difference < 0).sum())
    decided = longer + shorter
    share = longer / decided if decided else None
    return PairLengthCounts(longer, shorter, len(rows) - decided, share, [*_estimate_share(longer, decided)])


def _estimate_share(hits: int, rows: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's)."""
    if not rows:
        return 0.0, 1.0
    z = 1.96
    share, weight = hits / rows, z * z / rows
    middle, half = share + weight / 2, z * math.sqrt(share * (1 - share) / rows + weight / (4 * rows))
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)


# --- classes ----------------------------------------------------------------------------------------------------------


def _check_label_count(facts: RowFacts) -> Iterator[RowFinding]:
    """All rows have one label, or one class."""
    labels = facts.labels
    if len(labels) != 1:
        return
    ((name, rows),) = labels.items()
    if facts.source.format == "unpaired-preference":
        yield _make_class_finding("one-label", [rows], name)
    if facts.source.format == "classification" and rows.count == facts.labelled_rows:
        yield _make_class_finding("one-class", [rows], repr(name))


def _check_classes(facts: RowFacts) -> Iterator[RowFinding]:
    """Classes are too rare, or written in two ways."""
    labels = facts.labels
    if facts.source.format != "classification" or not labels:
        return
    most = max(rows.count for rows in labels.values())
    rare = {name: rows for name, rows in labels.items() if rows.count < RARE_CLASS_ROWS}
    rarer = {n: rows for n, rows in labels.items() if n not in rare and rows.count * IMBALANCE <= most}
    for code, classes in (("rare-class", rare), ("class-imbalance", rarer)):
        if classes:
            yield _make_class_finding(code, classes.values(), format_names(classes, 6))
    yield from _find_similar_labels(labels)


def _find_similar_labels(labels: Mapping[str, AffectedRows]) -> Iterator[RowFinding]:
    """Yield the finding for labels that look alike, with the one that most rows have as the way to write them."""
    spellings: dict[str, list[str]] = {}
    for name in sort_class_names(labels):
        spellings.setdefault(normalize_label_case_and_unicode(name), []).append(name)
    groups = [sorted(names, key=lambda n: -labels[n].count) for names in spellings.values() if len(names) > 1]
    if not groups:
        return
    shown = [", ".join(f"{n!a}: {labels[n].count:,}" for n in names) for names in groups[:SHOWN_GROUPS]]
    fixes = [f"{names[0]!a} in place of {' and '.join(map(ascii, names[1:]))}" for names in groups[:SHOWN_GROUPS]]
    more = f"; {len(groups) - SHOWN_GROUPS} more" if len(groups) > SHOWN_GROUPS else ""
    found = _make_class_finding(
        "similar-labels", [labels[n] for names in groups for n in names], "; ".join(shown) + more
    )
    hint = f"write each class in one way: {'; '.join(fixes)}{more}"
    yield RowFinding(found.code, replace(found.rows, hint=hint))


def _make_class_finding(code: str, classes: Collection[AffectedRows], example: str) -> RowFinding:
    lines = sorted(line for rows in classes for line in rows.lines)[:SHOWN_LINES]
    return RowFinding(code, AffectedRows(sum(rows.count for rows in classes), lines, example))


# --- validation rows --------------------------------------------------------------------------------------------------


def _check_validation_rows(facts: RowFacts) -> Iterator[RowFinding]:
    """Validation rows are invalid, or have labels that no training row has."""
    if facts.validation is None:
        return
    path, other = facts.validation
    found = AffectedRows()
    if columns := other.source.lossy_columns:
        line, loss = columns[0].line, describe_effect_of_ignoring_columns(columns)
        found = AffectedRows(columns[0].row_count, [line], f"{path}, line {line}: {loss}")
    if other.invalid_count:
        first = other.invalid[0]
        found.add([row.line for row in other.invalid], f"{path}, line {first.line}: {first.cause}")
        found.count = other.invalid_count
    if found.count:
        yield RowFinding("validation-invalid", found)
    if unseen := {name: rows for name, rows in other.labels.items() if name not in facts.labels}:
        likes = filter(None, (describe_lookalike_label(name, facts.labels) for name in unseen))
        example = "; ".join([f"{path}: {format_names(unseen, 6)}", *list(likes)[:SHOWN_GROUPS]])
        yield _make_class_finding("unseen-label", [*unseen.values()], example)


def _check_overlap(facts: RowFacts) -> Iterator[RowFinding]:
    """Rows are validation rows, too, or nearly."""
    if facts.validation is None:
        return
    path, other = facts.validation
    lines, other_lines = facts.stats_by_row["line"], other.stats_by_row["line"]
    texts, other_texts = facts.stats_by_row["hashes"][:, 0], other.stats_by_row["hashes"][:, 0]
    order = np.argsort(other_texts, kind="stable")
    same = np.flatnonzero(np.isin(texts, other_texts))
    match = order[np.searchsorted(other_texts[order], texts[same])]
    yield from _make_pair_finding("overlap", lines[same], other_lines[match], f"{path}: ", "is")
    near, match = match_minhash_signatures(other.signatures, facts.signatures)
    new = ~np.isin(facts.comparable_rows[near], same)
    near, match = facts.comparable_rows[near[new]], other.comparable_rows[match[new]]
    yield from _make_pair_finding("near-overlap", lines[near], other_lines[match], f"{path}: ", "is nearly")


CHECKS: tuple[Check, ...] = (
    _check_columns, _check_lengths, _check_duplicates, _check_swapped_texts, _check_contradictions, _check_same_answers,
    _check_contradictory_pairs, _check_answer_lengths, _check_label_count, _check_classes, _check_validation_rows,
    _check_overlap,
)  # fmt: skip
