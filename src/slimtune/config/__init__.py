"""The recipe: every setting of a run as one typed tree, read from YAML, from flags, or from both.

schema.py    the settings                        loading.py   YAML, `path=value`, paths
method.py    a method's and a task's own settings   aliases.py   old names
recipe.py    reads and checks them               errors.py    all errors in one message

PEFT's users import PEFT's names from here, too (`from slimtune.config import PeftConfig`).
"""

from ..peft_names import make_getattr
from .recipe import Recipe, load_recipe
from .schema import DataSettings, MethodSettings, ModelSettings, TaskSettings, TrainSettings

__all__ = ["DataSettings", "MethodSettings", "ModelSettings", "Recipe", "TaskSettings", "TrainSettings", "load_recipe"]

__getattr__ = make_getattr(__name__)
