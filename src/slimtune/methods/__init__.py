"""The methods: a folder here is one method, and its name is what `--method` says. Nothing lists them.

    vera/__init__.py      the idea and the formula; it imports only vera_config.py
    vera/vera_config.py   the settings. It imports torch in its functions alone, so that a wrong setting is answered at
                          once: torch takes seconds
    vera/vera_modules.py  the adapter modules, imported when the config builds them

A method without modules of its own is one file (`full.py`), and so may be a method in another package. The methods
import the core; start reading at `vera/`, and at docs/internals/adding_a_method.md to add one.
"""
