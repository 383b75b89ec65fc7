"""Distillation from another base (generalized knowledge distillation, Agarwal et al. 2023, arXiv 2306.13649).

    teacher   another base with the same tokenizer, loaded beside the student's, or on a server
    student   the recipe's base, with the adapter
    loss      divergence of the student's next-token distribution from the teacher's, over the tokens of the answers

Loaded here, it is `GKDTrainer` of TRL: in the share `lmbda` of the steps the answers are the student's own, in the
others those of the rows. On a server it is asked once about the answers of the rows, or samples them itself
(`seq_kd`), and gives its likeliest tokens at each token (teacher_logps.py): the loss is the forward KL over them and
the rest as one bucket, as of TRL's `ServerDistillationTrainer` with `beta` 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from ..core.adapters.config_fields import FieldError, config_field
from ..core.config.schema import Number
from ..core.foundation.files import to_json
from ..core.training.objective import Batch, Example
from ..errors import UsageError
from .teacher_objective import BETA_HELP, TeacherObjective, require_head

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from ..core.config import Recipe
    from ..core.data.collator import Collator
    from ..core.data.rows import Row
    from ..core.training.datasets import RunDatasets
    from ..core.training.prepared_run import PreparedRun
    from .teacher_logps import TeacherLogpFolder, TeacherServer

ON_SERVER = "with a teacher on a server"
DEFAULTS = (("lmbda", 0.5, 0.0), ("beta", 0.5, 0.0), ("temperature", 0.9, 1.0))
"""Settings that are not given: their values with a teacher that is loaded here, and with one on a server."""


@dataclass
class Distill(TeacherObjective):
    """Distillation from another base; TRL's names and defaults of GKD."""

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "to answer as another base with the same tokenizer does"

    # None only until `normalize` has filled them in.
    lmbda: Number | None = config_field(  # type: ignore[assignment]
        None,
        "share of the steps that learn from the student's own answers",
        when_null=f"0.5; {ON_SERVER} 0",
        ge=0,
        le=1,
    )
    beta: Number | None = config_field(  # type: ignore[assignment]
        None, BETA_HELP, when_null=f"0.5; {ON_SERVER} 0", ge=0, le=1
    )
    temperature: Number | None = config_field(  # type: ignore[assignment]
        None, "temperature of sampling and of both distributions", when_null=f"0.9; {ON_SERVER} 1", ge=0.01
    )
    teacher_model_name_or_path: str = config_field(
        "", "the teacher: an alias, a GGUF file, a folder or a Hub id; on a server its name there, if it has several"
    )
    teacher_model_server_url: str = config_field(
        "", "address of a server with the teacher: vLLM, slimtune serve or llama-server; empty: it is loaded here"
    )
    loss_top_k: int = config_field(20, "likeliest tokens of the teacher on a server to learn from", ge=1, le=10**6)
    teacher_server_timeout: Number = config_field(240.0, "seconds that a request to that server may take", gt=0)

    @property
    def computes_teacher_here(self) -> bool:
        return not self.teacher_model_server_url

    def normalize(self) -> None:
        for name, here, there in DEFAULTS:
            if getattr(self, name) is None:
                setattr(self, name, here if self.computes_teacher_here else there)

    def find_missing(self) -> Iterator[FieldError]:
        if self.computes_teacher_here and not self.teacher_model_name_or_path:
            hint = "--set task.teacher_model_name_or_path=BASE, or --set task.teacher_model_server_url=URL"
            yield self.error("teacher_model_name_or_path", "a base with the same tokenizer", hint)

    def find_conflicts(self) -> Iterator[FieldError]:
        if self.computes_teacher_here:
            if self.teacher_model_name_or_path.startswith(("http://", "https://")):
                hint = f"--set task.teacher_model_server_url={self.teacher_model_name_or_path}"
                yield self.error("teacher_model_name_or_path", "a base; a server has its own setting", hint)
            if self.seq_kd:
                yield self.error("seq_kd", "false: only a teacher on a server writes answers")
            return
        address = urlsplit(self.teacher_model_server_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            yield self.error("teacher_model_server_url", "the address of a server", "such as http://127.0.0.1:8000")
        reasons = ("it is asked once about given answers", "only the forward KL is known of its likeliest tokens")
        for (name, _, there), reason in zip(DEFAULTS, (*reasons, "its log-probabilities are those at 1"), strict=True):
            if getattr(self, name) != there:
                yield self.error(name, f"{there:g} with a teacher on a server: {reason}", f"leave task.{name} out")

    def list_plan_notes(self) -> Sequence[str]:
        if not self.computes_teacher_here:
            return (
                f"The teacher is on a server and takes no memory here. Before the first step it is asked about each "
                f"row, once, which this plan does not count; {8 * self.loss_top_k} bytes for each token of the answers "
                "are kept on disk.",
            )
        return (
            "The teacher's weights are planned, and its pass as if the teacher had the shape of the base. Sampling "
            "before a step takes time that this plan does not count.",
        )

    def make_teacher_row(self, row: Row) -> Row:
        """Return the row as it is."""
        return row

    def prepare_datasets(self, datasets: RunDatasets, recipe: Recipe, tokenizer: Any) -> RunDatasets:
        """Return the rows; raise UsageError if the tokenizer of a teacher that is loaded here is another one."""
        if not self.computes_teacher_here:
            return super().prepare_datasets(datasets, recipe, tokenizer)
        from ..core.models.loader import load_tokenizer

        teacher, model = self.teacher_model_name_or_path, recipe.model
        theirs = load_tokenizer(teacher, trust_remote_code=model.trust_remote_code).get_vocab()
        own = tokenizer.get_vocab()
        if theirs != own:
            token = next((t for t in sorted(own, key=own.__getitem__) if theirs.get(t) != own[t]), None)
            example = f"{len(theirs)} tokens against {len(own)}"
            if token is not None:
                place = "none" if token not in theirs else f"number {theirs[token]}"
                example = f"token {own[token]} of {model.name}, {token!r}, is {place} there"
            raise UsageError(
                f"{teacher} has another tokenizer than {model.name}: {example}",
                "a teacher with the same tokenizer, so that both give the same tokens a probability",
                "a larger base of the same family; or sft on answers that the teacher wrote",
                field="task.teacher_model_name_or_path",
            )
        return super().prepare_datasets(datasets, recipe, tokenizer)

    def require_servers(self, recipe: Recipe, data: RunDatasets) -> None:
        """Raise SlimtuneError unless the teacher's server gives what is missing yet, for the student's tokens."""
        if self.computes_teacher_here:
            return
        from ..core.training.base_model import load_base_tokenizer

        tokenizer = load_base_tokenizer(recipe.model, recipe.data.chat_template)
        folder = vars(self)["_folder"] = self._make_folder(recipe, data, tokenizer)
        if folder.list_missing():
            self._open_server(tokenizer)

    def _open_server(self, tokenizer: Any) -> TeacherServer:
        from .teacher_logps import TEACHER_SERVERS

        url, name, timeout = self.teacher_model_server_url, self.teacher_model_name_or_path, self.teacher_server_timeout
        return TEACHER_SERVERS.load("http")(url, name, tokenizer, self.loss_top_k, float(timeout))

    def _make_folder(self, recipe: Recipe, data: RunDatasets, tokenizer: Any) -> TeacherLogpFolder:
        from .sampled_answers import AnswerSampling
        from .teacher_logps import TeacherLogpFolder

        tokens = hashlib.sha256(to_json(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
        asked = {
            "teacher": self.teacher_model_server_url.rstrip("/").removesuffix("/v1"),
            "model": self.teacher_model_name_or_path,
            "tokenizer": tokens,
            "loss_top_k": self.loss_top_k,
        }
        sampling = AnswerSampling("", 1, 1.0, self.max_completion_length, recipe.train.seed)
        parts: dict[str, Any] = {"train": data.train, "validation": data.validation}
        return TeacherLogpFolder(Path(recipe.output_dir), asked, parts, sampling if self.seq_kd else None)

    def prepare_run(self, prepared: PreparedRun) -> None:
        """Load the teacher, on the student's device and in its dtype, or ask it about the rows."""
        if self.computes_teacher_here:
            self._load_teacher(prepared)
            super().prepare_run(prepared)
            return
        from ..core.foundation import distributed
        from .teacher_logps import ScoredTeacherCollator
        from .teacher_run import require_frozen_head

        require_frozen_head(prepared.model)
        recipe, data, tokenizer = prepared.recipe, prepared.data, prepared.base.tokenizer
        # Processes but the main one have none yet, nor has a run that is prepared again.
        folder, say = vars(self).pop("_folder", None) or self._make_folder(recipe, data, tokenizer), prepared.logger.say
        distributed.run_on_all_ranks(
            lambda: folder.collect(lambda: self._open_server(tokenizer), recipe.data.train, say)
        )
        data.train, data.validation = folder.add_to("train", data.train), folder.add_to("validation", data.validation)
        prepared.collator = ScoredTeacherCollator(prepared.collator)

    def _load_teacher(self, prepared: PreparedRun) -> None:
        from ..core.models.loader import load_base

        model = prepared.recipe.model
        prepared.logger.say(f"loading the teacher, {self.teacher_model_name_or_path}")
        teacher = load_base(
            self.teacher_model_name_or_path,
            dtype=model.dtype,
            device=prepared.device,
            trust_remote_code=model.trust_remote_code,
        ).model
        vars(self)["_teacher"] = teacher.requires_grad_(False).eval()

    def make_teacher_collator(self, collator: Collator) -> Collator:
        """Return a collator whose packing is exact for the teacher."""
        from ..core.training.loss import make_collator

        return make_collator(vars(self)["_teacher"], collator.pad_token_id)

    def using_teacher(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context with the other base."""
        from .teacher_run import using_other_base_as_teacher

        return using_other_base_as_teacher(vars(self)["_teacher"])

    def make_longest_examples(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples as they are if the teacher is on a server: no answer gets longer."""
        return super().make_longest_examples(examples) if self.computes_teacher_here else [*examples]

    def compute_values(self, model: Any, batch: Batch) -> Tensor:
        """Return the divergence of each learned token [K] from the teacher's distribution, in nats."""
        if "teacher_top_ids" not in batch:
            return super().compute_values(model, batch)
        from ..core.training.loss import get_head_and_supervised_hidden_states
        from .teacher_divergence import compute_top_k_divergences

        head, states = get_head_and_supervised_hidden_states(model, batch)
        return compute_top_k_divergences(
            states, require_head(head), batch["teacher_top_ids"], batch["teacher_top_logps"]
        )
