"""All values of all finished runs of an experiment, in a file of comma-separated values."""

import csv
import os
from pathlib import Path

KEYS = ("arm", "seed")


class Table:
    """{(arm, seed): {measure: value}}, kept in a file: a row a run, a column a measure, nothing where a run has none.

    Args:
        path: read if it is there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    key = row.pop("arm"), int(row.pop("seed"))
                    self.rows[key] = {name: float(value) for name, value in row.items() if value}

    def __contains__(self, key) -> bool:
        return key in self.rows

    def add(self, row: dict) -> None:
        """Adds a run, or puts it in the place of an earlier one, and writes the file."""
        self.rows[row["arm"], row["seed"]] = {name: value for name, value in row.items() if name not in KEYS}
        columns = dict.fromkeys(name for values in self.rows.values() for name in values)
        # Moved into place, so that an interruption loses no run.
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*KEYS, *columns])
            for key, values in sorted(self.rows.items()):
                cells = [f"{values[name]:.7g}" if name in values else "" for name in columns]
                writer.writerow([*key, *cells])
        os.replace(part, self.path)

    def of(self, arm: str, measure: str) -> dict:
        """{seed: value} of the runs of an arm that have the measure."""
        return {
            seed: values[measure] for (name, seed), values in self.rows.items() if name == arm and measure in values
        }
