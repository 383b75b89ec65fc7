"""What can be wrong with a reward, apart from what a function of the user's raises."""


class RewardArgumentError(ValueError):
    """What is wrong with the argument of a built-in reward; `expected` is what it takes."""

    def __init__(self, problem: str, expected: str) -> None:
        super().__init__(problem)
        self.expected = expected


class RewardColumnError(LookupError):
    """The rows do not have the column that a reward reads."""


class RewardUnavailableError(Exception):
    """What scores the answers cannot be reached, whatever the answers are."""
