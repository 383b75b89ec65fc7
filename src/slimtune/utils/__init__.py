"""Files, memory, processes, layers: helpers without knowledge of the rest; and PEFT's names of `peft.utils`."""

from ..peft_names import make_getattr

__getattr__ = make_getattr(__name__)
