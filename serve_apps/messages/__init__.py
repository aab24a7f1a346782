"""Messages that cross the border of a process: dataclasses, tuples, and parts of responses that a replica makes."""
