"""The ground floor: how files are written and read, whatever is in them. Needs neither torch nor anything of a model.

durable.py   written whole or not at all, also after a crash; read once, into memory of our own
reading.py   JSON and lines of JSON that somebody else may have written: strict, within limits, one error for all faults
"""

from selectune.files.durable import MAX_FILE, read_owned, write_durably
from selectune.files.reading import read_json, read_lines

__all__ = ["MAX_FILE", "read_json", "read_lines", "read_owned", "write_durably"]
