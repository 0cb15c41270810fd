"""Files of any content: how they are written and read. This room needs neither torch nor a model.

durable    written whole or not at all, also after a crash; read once, into memory of our own
manifest   a folder, such as a checkpoint, that is complete or refused
staging    a folder that appears whole or not at all
ownership  a folder that one process at a time may write into
reading    strict JSON, JSON lines and tables of text from untrusted files, within limits, with one error for all faults
"""

from selectune.files.durable import MAX_FILE, make_folder, read_owned, sweep, write_durably
from selectune.files.manifest import MANIFEST, Manifest, checkpoints, read_manifest, seal, verify
from selectune.files.ownership import own
from selectune.files.reading import read_csv, read_json, read_lines
from selectune.files.staging import staged

__all__ = [
    "MANIFEST", "MAX_FILE", "Manifest", "checkpoints", "make_folder", "own", "read_csv", "read_json",
    "read_lines", "read_manifest", "read_owned", "seal", "staged", "sweep", "verify", "write_durably",
]  # fmt: skip
