"""Extensions of the core that few runs use, each registered in `slimtune/parts.py`: file formats, conversion, hot-swap.

Imports the core. Each file stands alone; start at the one you need.
"""
