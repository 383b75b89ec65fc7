"""The recipe: every setting of a run as one typed tree, read from YAML, from flags, or from both.

schema.py            the settings                        recipe_loading.py   YAML, `path=value`, paths
method_settings.py   a method's and a task's own settings   aliases.py       old names
recipe.py            reads and checks them               field_errors.py     all errors in one message
"""

from .recipe import Recipe, load_recipe
from .schema import DataSettings, MethodSettings, ModelSettings, TaskSettings, TrainSettings

__all__ = ["DataSettings", "MethodSettings", "ModelSettings", "Recipe", "TaskSettings", "TrainSettings", "load_recipe"]
