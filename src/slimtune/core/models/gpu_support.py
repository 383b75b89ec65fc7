"""Which GPUs training runs on, for training and planning; without torch, so that a wrong name is answered at once."""

from typing import Literal

VENDOR_DEVICES: dict[str, Literal["cuda", "mps"]] = {"nvidia": "cuda", "amd": "cuda", "apple": "mps"}
"""Kind of device that torch has for the GPUs of a vendor that training runs on."""
NO_XPU = "slimtune does not train on Intel GPUs (torch's device xpu): no run was ever tested on one"
