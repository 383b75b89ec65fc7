"""Folding adapters into the base's weights: for a while, or for good."""

from __future__ import annotations

from typing import Any

from . import layer


class AdapterMerging:
    """The part of a `PeftModel` that merges."""

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the active adapters (or these) into the base's weights; `unmerge_adapter` restores them bit for bit.

        Raises:
            MergeRefused: a method cannot be merged, the base is quantized, or (safe_merge) a result is not finite.
        """
        at = self._attached
        if at.merged:
            return
        self._enabled("merge_adapter")
        names = [self._known(n) for n in dict.fromkeys(adapter_names or at.active)]
        self._no_module_twice(names)
        members = {n: m for a in names for n, m in at.members[a]}
        try:
            for name, module in members.items():
                layer.merge(name or type(self).__name__, module, names, check=safe_merge)
            at.merged = names
            self._rerun()
        finally:
            if not at.merged:
                for module in members.values():
                    layer.unmerge(module)

    def unmerge_adapter(self: Any) -> None:
        """Take a merge out again: the base's parameters are the very objects they were."""
        at = self._attached
        for module in at.modules().values():
            layer.unmerge(module)
        at.merged = []
        self._rerun()

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge for good and return the plain base: its own class, no adapters, its weights changed."""
        del progressbar
        names: dict[int, list[str]] = {}
        for n, p in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(n)
        shared = [group for group in names.values() if len(group) > 1]
        self.unmerge_adapter()
        self.merge_adapter(adapter_names, safe_merge)
        after = dict(self.named_parameters(remove_duplicate=False))
        model = self._strip()
        if any(len({id(after[n]) for n in group}) > 1 for group in shared):
            _untie(model)
        return model


def _untie(model: Any) -> None:
    """Say in the config that embeddings and head are two tensors now, so that saving keeps both."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
