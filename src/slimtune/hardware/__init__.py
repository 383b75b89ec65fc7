"""Machines and what they cost: speed benchmark, prices, which machine to choose.

Imports the core, planning and generation. Start at `machine_choice.py`.
"""
