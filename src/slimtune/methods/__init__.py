"""The methods: a module here is one method, and its name is what `--method` says. Nothing lists them.

    vera.py              a config class, whose `name` is the module's, and the adapter modules that it builds
    vera/__init__.py     the same as a folder: the idea and the formula; it imports only vera_config.py
    vera/vera_config.py  the settings. It imports torch in its functions alone, so that a wrong setting is answered at
                         once: torch takes seconds
    vera/vera_modules.py the adapter modules, imported when the config builds them

Start with one file; its settings are checked like all others, after torch's import. The methods that come with
slimtune are folders. They import the core; start reading at `vera/`.
"""
