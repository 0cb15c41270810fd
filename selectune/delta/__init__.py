"""The delta: what training changed, as one file that a base model takes on and off, bit for bit.

delta     `Delta`, the value that users hold; `load`
diff      a delta out of any two models of one shape
file/     the file: bytes in, checked parts out
live/     deltas on a live model: apply, revert, switch, verify
combine/  several deltas together: sums, merges, overlap
"""

from selectune.delta.combine import algebra
from selectune.delta.delta import DELTA_FILE, Delta, load, versions
from selectune.delta.diff import diff
from selectune.delta.file.adapter_record import belongs, forget_module, module_digest, module_of, record_module
from selectune.delta.file.fingerprint import digest_bits, inventory, structure_digest, weights_digest
from selectune.delta.file.model_info import base_info, model_info
from selectune.delta.file.parts import Dense, Patch
from selectune.delta.file.schema import canonical_name
from selectune.delta.live.shelf import Shelf, switch
from selectune.delta.live.verify import Report

__all__ = [
    "DELTA_FILE",
    "Delta",
    "Dense",
    "Patch",
    "Report",
    "Shelf",
    "algebra",
    "base_info",
    "belongs",
    "canonical_name",
    "diff",
    "digest_bits",
    "forget_module",
    "inventory",
    "load",
    "model_info",
    "module_digest",
    "module_of",
    "record_module",
    "structure_digest",
    "switch",
    "versions",
    "weights_digest",
]
