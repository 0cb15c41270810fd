"""The ground floor: how files are written and read, whatever is in them. Needs neither torch nor anything of a model.

durable.py    written whole or not at all, also after a crash; read once, into memory of our own
manifest.py   a folder that is complete or none, such as a checkpoint
ownership.py  a folder that one process at a time may write into
reading.py    JSON and lines of JSON that others may have written: strict, within limits, one error for all faults
"""

from selectune.files.durable import MAX_FILE, make_folder, read_owned, sweep, write_durably
from selectune.files.manifest import MANIFEST, Manifest, checkpoints, read_manifest, seal, verify
from selectune.files.ownership import own
from selectune.files.reading import read_json, read_lines

__all__ = [
    "MANIFEST",
    "MAX_FILE",
    "Manifest",
    "checkpoints",
    "make_folder",
    "own",
    "read_json",
    "read_lines",
    "read_manifest",
    "read_owned",
    "seal",
    "sweep",
    "verify",
    "write_durably",
]
