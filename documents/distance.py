"""How far a reading is from the print."""


def edit_distance(first: str, second: str) -> int:
    """Return the fewest insertions, deletions and replacements that turn one string into the other."""
    row = list(range(len(second) + 1))
    for index, character in enumerate(first, 1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(second, 1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (character != other)),
            )
    return row[-1]
