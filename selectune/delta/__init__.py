"""The delta: what training changed, as one file that a base model takes on and off, bit for bit."""

from selectune.delta import algebra
from selectune.delta.base import base_info, model_info
from selectune.delta.delta import DELTA_FILE, Delta, load, versions
from selectune.delta.diff import diff
from selectune.delta.fingerprint import digest_bits, inventory, structure_digest, weights_digest
from selectune.delta.modules import belongs, forget_module, module_digest, module_of, record_module
from selectune.delta.parts import Dense, Patch
from selectune.delta.schema import canonical_name
from selectune.delta.shelf import Shelf, switch
from selectune.delta.verify import Report

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
