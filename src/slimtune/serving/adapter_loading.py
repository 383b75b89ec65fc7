"""Adapters that come and go while the server runs, by vLLM's requests: what trains elsewhere sends each new one here.

    POST /v1/load_lora_adapter      {"lora_name": …, "lora_path": …}      the adapter is a model of this name now
    POST /v1/unload_lora_adapter    {"lora_name": …}

Only folders below the one that the server was started with are read. An adapter is added to the shared model between
two steps of the thread that generates, so answers that run are not touched.
"""

import itertools
from dataclasses import replace
from pathlib import Path

from ..core.adapters.peft_config import PeftConfig
from ..core.training.trained_model import TrainedModel
from ..generation.text_generator import TextGenerator
from .openai_protocol import ApiError
from .served_models import ServedModel, make_served_model


class AdapterLoader:
    """Adds adapters to the model of a server, and removes them.

    Args:
        base: the shared model with its base and tokenizer.
        generator: runs the model.
        folder: that adapters must be below.
        max_length: most tokens of a prompt and its answer.
    """

    def __init__(self, base: TrainedModel, generator: TextGenerator, folder: Path, max_length: int) -> None:
        self._base, self._generator, self._folder, self._max_length = base, generator, folder.resolve(), max_length
        self._numbers = itertools.count()

    def load(self, name: str, path: str) -> ServedModel:
        """Load the adapter in a folder as the model `name`; raise ApiError for a folder elsewhere, or none."""
        folder = Path(path).resolve()
        if not folder.is_relative_to(self._folder):
            message = f"{path[:300]} is not below {self._folder}, where this server takes adapters from"
            raise ApiError(403, message, "lora_path", "wrong_folder")
        if not (folder / "adapter_config.json").is_file():
            raise ApiError(404, f"{path[:300]} has no adapter_config.json there", "lora_path", "adapter_not_found")
        config = PeftConfig.from_pretrained(folder)
        own = f"loaded_{next(self._numbers)}"
        self._generator.change_between_steps(lambda: self._base.model.load_adapter(folder, own, config=config))
        trained = replace(self._base, adapter_folder=folder, adapter_name=own)
        return make_served_model(name, trained, own, self._max_length, self._base.base.source.name)

    def unload(self, served: ServedModel) -> None:
        """Remove the adapter of a model; raise ApiError while it answers, or if it was not loaded by a request."""
        adapter = served.adapter_or_base
        if not adapter.startswith("loaded_"):
            raise ApiError(400, f"{served.name!r} was there from the start", "lora_name", "not_unloadable")

        def remove() -> None:
            if self._generator.is_answering(adapter):
                raise ApiError(409, f"{served.name!r} is answering", "lora_name", "adapter_in_use")
            self._base.model.delete_adapter(adapter)

        self._generator.change_between_steps(remove)
