"""Rewards: what scores the answers that a model samples while it trains.

A reward is a Python function of the user's, a program or a server (`outside_rewards.py`), or a built-in one
(`builtin_rewards.py`), named by a text (`reward_specs.py`). Each runs in a process of its own (`reward_workers.py`
starts it, `reward_process.py` is what runs there), so that one that hangs, prints or crashes ends nothing but itself.
Imports the core alone.
"""
