"""The delta: the changes of a training run as one file, applied to its base model and reverted bit for bit.

delta     `Delta`, the value that users hold; `load`
diff      the delta between any two models of one structure
hub       deltas on the Hugging Face hub: pushed, and fetched at a commit
card      the model card of a delta there
file/     the file: bytes in, checked parts out
live/     deltas on a live model: apply, revert, switch, verify
combine/  several deltas together: sums, merges, overlap
"""

from selectune.delta.combine import algebra
from selectune.delta.delta import DELTA_FILE, Delta, file_of, load
from selectune.delta.diff import diff
from selectune.delta.file.adapter_record import AdapterRecord, adapter_of, forget_adapter, is_marked, record_adapter
from selectune.delta.file.content import versions
from selectune.delta.file.fingerprint import adapter_digest, digest_bits, inventory, structure_digest, weights_digest
from selectune.delta.file.model_info import base_info, model_info
from selectune.delta.file.parts import Dense, Patch
from selectune.delta.file.schema import canonical_name
from selectune.delta.live.shelf import Shelf, switch
from selectune.delta.live.verify import Report

__all__ = [
    "DELTA_FILE", "AdapterRecord", "Delta", "Dense", "Patch", "Report", "Shelf", "adapter_digest", "adapter_of",
    "algebra", "base_info", "canonical_name", "diff", "digest_bits", "file_of", "forget_adapter", "inventory",
    "is_marked", "load", "model_info", "record_adapter", "structure_digest", "switch", "versions", "weights_digest",
]  # fmt: skip
