"""What a teacher on a server says of the rows' answers: asked once, kept in files beside the run.

    runs/small                     the run
    runs/teacher-3f9a12…           for each `ROWS_AT_ONCE` rows a file, and teacher.json, which says whose they are

A file has `answers` (int32 [T], the tokens of the answers one after another), `ends` (int64 [R], where each row's end),
and for each learned token `top_ids` (int32 [L, k]) and `top_logps` (fp32 [L, k]; −Inf where there are fewer), with
`learned_ends` (int64 [R]). The folder's name is a digest of the teacher, the rows, the tokenizer and what was asked. So
runs with other learning rates find it, and a collection that was killed goes on with the files that are missing.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core.data.collator import Collator
from ..core.foundation import distributed
from ..core.foundation.files import to_json, translate_os_errors, write_atomic, write_json
from ..core.foundation.formatting import format_duration
from ..core.foundation.registry import Registry
from ..core.training.objective import Batch, Example
from ..errors import RunError, SlimtuneError
from ..extras.row_digest import hash_rows
from .sampled_answers import AnswerSampling
from .teacher_rows import TEACHER_KEYS, TeacherRows, split_at_last_answer

ROWS_AT_ONCE = 32
"""Rows of a file: what is asked again after a kill."""
SECONDS_BETWEEN_LINES = 30.0
TOP_KEYS = ("teacher_top_ids", "teacher_top_logps")
"""Keys of an example, and of a batch: the teacher's likeliest tokens at each learned one [L, k]."""


@dataclass(frozen=True)
class TopLogps:
    """The likeliest tokens at each token of an answer, and their log-probabilities."""

    token_ids: np.ndarray  # int32 [L, k]
    logps: np.ndarray  # fp32 [L, k]; −Inf where there are fewer


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer, and what the teacher says of its learned tokens."""

    token_ids: list[int]
    top: TopLogps


class TeacherServer(Protocol):
    """A server that was tried out: it has the student's tokenizer, and gives log-probabilities."""

    requests_at_once: int

    def score(self, ids: Sequence[int], start: int) -> TopLogps:
        """Return the likeliest tokens at each token of a text from an index on, 1 or more."""

    def sample(self, prompt: Sequence[int], how: AnswerSampling) -> list[int]:
        """Return the tokens of an answer, with the one that ends it."""


TEACHER_SERVERS: Registry[Callable[[str, str, Any, int, float], TeacherServer]] = Registry(
    "slimtune.teacher_servers", "teacher on a server"
)
"""From a server's address, the model's name there (empty: the only one), the student's tokenizer, how many tokens to
ask for at each position, and the seconds that a request may take."""


class TeacherLogpFolder:
    """The folder with what a teacher says of a run's rows.

    Args:
        beside: the run's folder.
        asked: the teacher, its settings and the tokenizer, as JSON has them.
        parts: the rows by "train" and "validation".
        sampling: how the teacher's own answers are sampled, in place of the rows' answers; None: they are learned.
    """

    def __init__(
        self, beside: Path, asked: Mapping[str, Any], parts: Mapping[str, TeacherRows], sampling: AnswerSampling | None
    ) -> None:
        self.parts, self.sampling = {name: rows for name, rows in parts.items() if len(rows)}, sampling
        self.key = {**asked, "rows": {name: hash_rows(rows) for name, rows in self.parts.items()}}
        if sampling is not None:
            self.key["sampling"] = [sampling.temperature, sampling.max_new_tokens, sampling.seed]
        digest = hashlib.blake2b(to_json(self.key, sort_keys=True).encode(), digest_size=6).hexdigest()
        self.path = beside.absolute().parent / f"teacher-{digest}"

    def list_missing(self) -> list[tuple[str, int]]:
        """Return the part and the first row of each file that is not there."""
        starts = ((name, start) for name, rows in self.parts.items() for start in range(0, len(rows), ROWS_AT_ONCE))
        return [each for each in starts if not self._name_file(*each).is_file()]

    def _name_file(self, part: str, number: int) -> Path:
        return self.path / f"{part}-{number // ROWS_AT_ONCE * ROWS_AT_ONCE:07d}.safetensors"

    def collect(self, open_server: Callable[[], TeacherServer], file: Path, say: Callable[[str], None]) -> None:
        """Ask the teacher about all rows that are missing; each process asks about a part of them.

        Raises:
            SlimtuneError: the server cannot be asked, or fails; what it said until then is kept.
        """
        missing = self.list_missing()[distributed.rank() :: distributed.world_size()]
        if not missing:
            return
        with translate_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "teacher.json", self.key)
        server = open_server()
        rows = sum(min(ROWS_AT_ONCE, len(self.parts[part]) - start) for part, start in missing)
        say(f"the teacher is asked about {rows} rows, once; its log-probabilities are kept in {self.path}")
        done, started, said = 0, time.monotonic(), time.monotonic()
        pool = ThreadPoolExecutor(server.requests_at_once)
        try:
            for part, start in missing:
                numbers = range(start, min(start + ROWS_AT_ONCE, len(self.parts[part])))
                scored = [*pool.map(lambda n, part=part: self._ask(server, part, n, file), numbers)]
                self._write(self._name_file(part, start), scored)
                done += len(scored)
                if (now := time.monotonic()) - said > SECONDS_BETWEEN_LINES and done < rows:
                    left = (now - started) / done * (rows - done)
                    say(f"the teacher has answered about {done} of {rows} rows; about {format_duration(left)} are left")
                    said = now
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, server: TeacherServer, part: str, number: int, file: Path) -> ScoredAnswer:
        rows = self.parts[part]
        example, taught = rows.read(number), split_at_last_answer(rows.teacher_rows.read(number))
        prompt, answer = split_at_last_answer(example)
        try:
            if self.sampling is not None:
                how = self.sampling
                seed = int.from_bytes(hashlib.blake2b(f"{how.seed} {part} {number}".encode(), digest_size=4).digest())
                answer = server.sample(taught.prompt, replace(how, seed=seed))
            is_first_learned = bool(prompt and taught.prompt)  # as in `make_teacher_example`
            start = len(taught.prompt) + (not is_first_learned)
            if start >= len(taught.prompt) + len(answer):
                raise RunError(f"the teacher's answer has {len(answer)} tokens, and none of them can be learned")
            return ScoredAnswer(answer, server.score([*taught.prompt, *answer], start))
        except SlimtuneError as error:
            message = f"{file}, line {example['line']}: {error.message}"
            hint = f"{error.hint}; " if error.hint else ""
            hint += "the rows before it are kept: the same command goes on with those that are missing"
            raise RunError(message, error.expected, hint, code="teacher-failed") from error

    def _write(self, file: Path, scored: Sequence[ScoredAnswer]) -> None:
        tensors = {
            "answers": np.array([t for one in scored for t in one.token_ids], np.int32),
            "ends": np.cumsum([len(one.token_ids) for one in scored]),
            "top_ids": np.concatenate([one.top.token_ids for one in scored]),
            "top_logps": np.concatenate([one.top.logps for one in scored]),
            "learned_ends": np.cumsum([len(one.top.token_ids) for one in scored]),
        }
        write_atomic(file, save(tensors))

    def read(self, part: str, number: int) -> ScoredAnswer:
        """Return the answer of a row, and what the teacher says of it; raise RunError if its file is damaged."""
        file, place = self._name_file(part, number), number % ROWS_AT_ONCE
        try:
            with translate_os_errors(file), safe_open(file, framework="numpy") as opened:
                ends, learned_ends = ([0, *opened.get_tensor(name).tolist()] for name in ("ends", "learned_ends"))
                (a, b), (c, d) = ends[place : place + 2], learned_ends[place : place + 2]
                answers, ids, logps = (opened.get_slice(name) for name in ("answers", "top_ids", "top_logps"))
                return ScoredAnswer(answers[a:b].tolist(), TopLogps(ids[c:d], logps[c:d]))
        except (SafetensorError, ValueError) as error:
            raise RunError(
                f"{file} is damaged ({error})", "what the teacher said of the rows", "delete it: it is asked again"
            ) from error

    def add_to(self, part: str, rows: Any) -> Any:
        """Return rows with what the teacher says of them."""
        if part not in self.parts:
            return rows
        answers = None
        if self.sampling is not None:
            answers = [self.read(part, number).token_ids for number in range(len(rows))]
        return ScoredTeacherRows(rows, lambda number: self.read(part, number).top, np.arange(len(rows)), answers)


class ScoredTeacherRows(TeacherRows):
    """Rows with the teacher's likeliest tokens at each learned one.

    Args:
        rows: as the student reads them.
        read_top: returns what the teacher says of a row, by its number.
        numbers: of these rows for `read_top`, int64 [N].
        answers: what takes the place of the rows' answers; None: the rows' own.
    """

    def __init__(
        self,
        rows: TeacherRows,
        read_top: Callable[[int], TopLogps],
        numbers: np.ndarray,
        answers: Sequence[Sequence[int]] | None,
    ) -> None:
        super().__init__(rows, rows.teacher_rows, answers)
        self.read_top, self.numbers = read_top, numbers

    def select(self, indices: Any) -> "ScoredTeacherRows":
        found = super().select(indices)
        return ScoredTeacherRows(found, self.read_top, self.numbers[indices], found.answers)

    def read(self, number: int, start: int = 0, end: int | None = None) -> Example:
        """Return an example with what the teacher says of it, or the student's tokens from `start` to `end`."""
        found = super().read(number, start, end)
        if (start, end) != (0, None):
            return found
        top = self.read_top(int(self.numbers[number]))
        own = {key: value for key, value in found.items() if key not in TEACHER_KEYS.values()}
        return own | dict(zip(TOP_KEYS, (top.token_ids, top.logps), strict=True))


class ScoredTeacherCollator(Collator):
    """Makes micro-batches that have the teacher's likeliest tokens at each learned one, in the order of `targets`."""

    def __init__(self, collator: Collator) -> None:
        vars(self).update(vars(collator))

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return a micro-batch; rows of which the teacher said nothing make an ordinary one."""
        batch = super().__call__([{k: v for k, v in e.items() if k not in TOP_KEYS} for e in examples])
        if TOP_KEYS[0] not in examples[0]:
            return batch
        return batch | {key: torch.tensor(np.concatenate([e[key] for e in examples])) for key in TOP_KEYS}
