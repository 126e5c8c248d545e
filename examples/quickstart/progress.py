"""A progress bar over several training runs; where the output is no terminal, a line now and then."""

import sys

from tqdm import tqdm

LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {remaining} left{postfix}"


class Progress(tqdm):
    """A bar of tqdm that also suits logs.

    Args:
        total: how much there is to do, in all runs together.
        unit: what is counted.
        stream: where to print (default: standard output).
        seconds_between_lines: at least, where the stream is no terminal.
        options: further ones of tqdm.
    """

    def __init__(self, total, unit, stream=None, seconds_between_lines=30, **options):
        stream = stream or sys.stdout
        if not stream.isatty():
            options.update(bar_format=LINE, mininterval=seconds_between_lines)
        # miniters: tqdm's guess of how often to look is for loops that are faster than these.
        super().__init__(total=total, unit=unit, file=stream, miniters=0, **options)

    def display(self, msg=None, pos=None):
        if self.fp.isatty():
            super().display(msg, pos)
        else:
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def advance(self, done, note):
        """Shows that ``done`` of the total is done, and a note."""
        self.set_postfix_str(note, refresh=False)
        self.update(done - self.n)
