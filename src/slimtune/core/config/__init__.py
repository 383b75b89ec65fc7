"""The recipe: every setting of a run as one typed tree, read from YAML, from flags, or from both.

schema.py            the sections' settings                     recipe_loading.py   files, `path=value`, paths
method_settings.py   a method's and a task's own settings       recipe.py           reads, checks, and names all errors

Imports `adapters/config_fields.py`, which declares a setting, and the registries of methods and objectives; no torch.
"""

from .recipe import Recipe, load_recipe
from .schema import DataSettings, MethodSettings, ModelSettings, TaskSettings, TrainSettings

__all__ = ["DataSettings", "MethodSettings", "ModelSettings", "Recipe", "TaskSettings", "TrainSettings", "load_recipe"]
