"""Messages that cross the border of a process: plain dataclasses and tuples."""
