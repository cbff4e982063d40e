"""Who exchanges with whom: every pair once, all machines busy in every round."""

from collections.abc import Sequence


def rounds(num: int) -> list[list[tuple[int, int]]]:
    """A round-robin of `num` players by the circle method: num − 1 rounds, or num if it is odd.

    One player stays and the others move on by one seat a round; whoever sits opposite is the
    partner. With an odd number the one opposite the empty seat rests.
    """
    seats: list[int | None] = [*range(num), *([None] if num % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def spread_out(schedule: Sequence[list[tuple[int, int]]], most: int) -> list[list[tuple[int, int]]]:
    """At most so many rounds, evenly spread over the schedule: thousands of nodes in a minute."""
    if len(schedule) <= most:
        return list(schedule)
    return [schedule[number * len(schedule) // most] for number in range(most)]
